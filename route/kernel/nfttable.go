package kernel

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// nfTable is one table as we want it, for the kernel and as text.
type nfTable struct {
	fam      uint8
	name     string
	counters []string
	sets     []*nfSet
	chains   []*nfChain
}

type nfSet struct {
	name    string
	keyText string
	keyType uint32 // for nft(8)
	keyLen  uint32
	timeout bool
	elems   []nfElem

	// For a set that rules fill:
	dynamic bool
	size    uint32
	keep    time.Duration // how long an element stays
}

type nfElem struct {
	key     []byte
	text    string
	timeout time.Duration
}

type nfChain struct {
	name   string
	kind   string // filter, route, nat; "": not a base chain
	hook   uint32
	prio   int32
	device string // netdev
	rules  [][]term
}

func (c *nfChain) add(terms ...term) { c.rules = append(c.rules, terms) }

func (t *nfTable) chain(c *nfChain) *nfChain {
	t.chains = append(t.chains, c)
	return c
}

var famNames = map[uint8]string{
	unix.NFPROTO_INET: "inet", unix.NFPROTO_ARP: "arp", unix.NFPROTO_BRIDGE: "bridge", unix.NFPROTO_NETDEV: "netdev",
}

var hookNames = map[uint32]string{unix.NF_INET_PRE_ROUTING: "prerouting", unix.NF_INET_LOCAL_IN: "input",
	unix.NF_INET_FORWARD: "forward", unix.NF_INET_LOCAL_OUT: "output", unix.NF_INET_POST_ROUTING: "postrouting"}

func (t *nfTable) hookName(h uint32) string {
	switch {
	case t.fam == unix.NFPROTO_NETDEV:
		return "egress"
	case t.fam == unix.NFPROTO_ARP:
		return "input"
	}
	return hookNames[h]
}

// lines returns the table as commands of nft(8), one on each line.
func (t *nfTable) lines() (out []string) {
	at := famNames[t.fam] + " " + t.name
	say := func(format string, a ...any) { out = append(out, "nft "+fmt.Sprintf(format, a...)) }
	say("add table %s", at)
	for _, c := range t.counters {
		say("add counter %s %s", at, c)
	}
	for _, s := range t.sets {
		flags := ""
		switch {
		case s.dynamic:
			flags = fmt.Sprintf(" size %d; flags dynamic,timeout; timeout %s;", s.size, nftTime(s.keep))
		case s.timeout:
			flags = " flags timeout;"
		}
		say("add set %s %s { type %s;%s }", at, s.name, s.keyText, flags)
		for _, e := range s.elems {
			timeout := ""
			if e.timeout > 0 {
				timeout = " timeout " + e.timeout.String()
			}
			say("add element %s %s { %s%s }", at, s.name, e.text, timeout)
		}
	}
	for _, c := range t.chains {
		if c.kind == "" {
			say("add chain %s %s", at, c.name)
			continue
		}
		device := ""
		if c.device != "" {
			device = fmt.Sprintf(" device %q", c.device)
		}
		say("add chain %s %s { type %s hook %s%s priority %d; }", at, c.name, c.kind, t.hookName(c.hook), device, c.prio)
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			words := make([]string, len(r))
			for i, x := range r {
				words[i] = x.text
			}
			say("add rule %s %s %s", at, c.name, strings.Join(words, " "))
		}
	}
	return out
}

// nftTime formats a time for nft(8).
func nftTime(d time.Duration) string { return fmt.Sprintf("%ds", int(d.Seconds())) }

func delTable(fam uint8, name string) nfMsg {
	return nfMsg{op: unix.NFT_MSG_DELTABLE, fam: fam, attrs: attrString(unix.NFTA_TABLE_NAME, name),
		text: "delete table " + famNames[fam] + " " + name}
}

// messages returns the messages that create the table.
func (t *nfTable) messages(flags uint32) ([]nfMsg, error) {
	at := famNames[t.fam] + " " + t.name
	var out []nfMsg
	say := func(op uint16, flags uint16, attrs []byte, format string, a ...any) *nfMsg {
		out = append(out, nfMsg{op: op, fam: t.fam, flags: flags, attrs: attrs, text: fmt.Sprintf(format, a...)})
		return &out[len(out)-1]
	}
	head := attrString(unix.NFTA_TABLE_NAME, t.name)
	say(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, cat(head, attrU32(unix.NFTA_TABLE_FLAGS, flags)), "add table %s", at)
	for _, c := range t.counters {
		say(unix.NFT_MSG_NEWOBJ, unix.NLM_F_CREATE,
			cat(attrString(unix.NFTA_OBJ_TABLE, t.name), attrString(unix.NFTA_OBJ_NAME, c),
				attrU32(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER),
				nested(unix.NFTA_OBJ_DATA, attrU64(unix.NFTA_COUNTER_BYTES, 0), attrU64(unix.NFTA_COUNTER_PACKETS, 0))),
			"add counter %s %s", at, c).needs = []*need{needCounter}
	}
	for i, s := range t.sets {
		a := cat(attrString(unix.NFTA_SET_TABLE, t.name), attrString(unix.NFTA_SET_NAME, s.name),
			attrU32(unix.NFTA_SET_KEY_TYPE, s.keyType), attrU32(unix.NFTA_SET_KEY_LEN, s.keyLen),
			attrU32(unix.NFTA_SET_ID, uint32(i+1)))
		switch {
		case s.dynamic:
			a = cat(a, attrU32(unix.NFTA_SET_FLAGS, unix.NFT_SET_TIMEOUT|unix.NFT_SET_EVAL),
				attrU64(unix.NFTA_SET_TIMEOUT, uint64(s.keep.Milliseconds())),
				nested(unix.NFTA_SET_DESC, attrU32(unix.NFTA_SET_DESC_SIZE, s.size)))
		case s.timeout:
			a = append(a, attrU32(unix.NFTA_SET_FLAGS, unix.NFT_SET_TIMEOUT)...)
		}
		say(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, a, "add set %s %s", at, s.name).needs = s.needs()
		out = append(out, elements(t, s, unix.NFT_MSG_NEWSETELEM, s.elems)...)
	}
	for _, c := range t.chains {
		a := cat(attrString(unix.NFTA_CHAIN_TABLE, t.name), attrString(unix.NFTA_CHAIN_NAME, c.name))
		if c.kind != "" {
			hook := cat(attrU32(unix.NFTA_HOOK_HOOKNUM, c.hook), attrU32(unix.NFTA_HOOK_PRIORITY, uint32(c.prio)))
			if c.device != "" {
				hook = append(hook, attrString(unix.NFTA_HOOK_DEV, c.device)...)
			}
			a = cat(a, nested(unix.NFTA_CHAIN_HOOK, hook), attrU32(unix.NFTA_CHAIN_POLICY, 1),
				attrString(unix.NFTA_CHAIN_TYPE, c.kind))
		}
		say(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, a, "add chain %s %s", at, c.name).needs = c.needs(t.fam)
	}
	for _, c := range t.chains {
		for _, r := range c.rules {
			a, needs, text, err := encodeRule(t.fam, r)
			if err != nil {
				return nil, err
			}
			say(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, cat(attrString(unix.NFTA_RULE_TABLE, t.name),
				attrString(unix.NFTA_RULE_CHAIN, c.name), nested(unix.NFTA_RULE_EXPRESSIONS, a)),
				"add rule %s %s %s", at, c.name, text).needs = needs
		}
	}
	return out, nil
}

// encodeRule returns the expressions of a rule, what the kernel needs for them, and the rule as text.
func encodeRule(fam uint8, r []term) (exprs []byte, needs []*need, text string, err error) {
	words := make([]string, len(r))
	for i, x := range r {
		needs = append(needs, x.needs()...)
		b, err := encodeExprs(fam, x.exprs)
		if err != nil {
			return nil, nil, "", fmt.Errorf("cannot encode %q: %w", x.text, err)
		}
		exprs = append(exprs, b...)
		words[i] = x.text
	}
	return exprs, needs, strings.Join(words, " "), nil
}

// elements returns messages that add or delete elements of a set. There may be several, because an attribute's length
// has 16 bits.
func elements(t *nfTable, s *nfSet, op uint16, elems []nfElem) (out []nfMsg) {
	for len(elems) > 0 {
		n := min(len(elems), 400)
		var list []byte
		for _, e := range elems[:n] {
			a := nested(unix.NFTA_SET_ELEM_KEY, attr(unix.NFTA_DATA_VALUE, e.key))
			if e.timeout > 0 && op == unix.NFT_MSG_NEWSETELEM {
				a = append(a, attrU64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(e.timeout.Milliseconds()))...)
			}
			list = append(list, nested(unix.NFTA_LIST_ELEM, a)...)
		}
		var flags uint16
		if op == unix.NFT_MSG_NEWSETELEM {
			flags = unix.NLM_F_CREATE
		}
		out = append(out, nfMsg{op: op, fam: t.fam, flags: flags, text: "elements of set " + t.name + " " + s.name,
			attrs: cat(attrString(unix.NFTA_SET_ELEM_LIST_TABLE, t.name), attrString(unix.NFTA_SET_ELEM_LIST_SET, s.name),
				nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, list))})
		elems = elems[n:]
	}
	return out
}

// flushSet returns the message that removes all elements of a set.
func flushSet(fam uint8, table, set string) nfMsg {
	return nfMsg{op: unix.NFT_MSG_DELSETELEM, fam: fam, text: "flush set " + set,
		attrs: cat(attrString(unix.NFTA_SET_ELEM_LIST_TABLE, table), attrString(unix.NFTA_SET_ELEM_LIST_SET, set))}
}
