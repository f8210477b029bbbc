package kernel

import (
	"errors"
	"fmt"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// need is a part of nftables that a kernel may lack; most parts are separate modules.
type need struct {
	what string // "this kernel has no ..."
	how  string // what the user can do
}

const orRun = "or use 'viasocks run' for one program"

var (
	needTables = &need{"nf_tables", "load the module nf_tables, " + orRun}
	needInet   = &need{"nf_tables for both families", "it must be built with CONFIG_NF_TABLES_INET; " + orRun}
	needRoute  = &need{
		"nftables chains of type route",
		"load the modules nft_chain_route_ipv4 and nft_chain_route_ipv6, " + orRun,
	}
	needEgress   = &need{"netdev egress hook", "it came with Linux 5.16, CONFIG_NETFILTER_EGRESS; leave out --strict"}
	needCounter  = &need{"nftables counter", "load the module nft_counter, " + orRun}
	needObjref   = &need{"nftables objref", "load the module nft_objref, " + orRun}
	needConcat   = &need{"nftables sets of several fields", "load the module nft_set_hash, " + orRun}
	needTimeout  = &need{"nftables sets with timeouts", "load the module nft_set_hash, " + orRun}
	needNAT      = &need{"nftables nat in inet tables", "load the modules nft_chain_nat and nft_nat, of Linux 5.2 or later"}
	needCt       = &need{"nftables ct", "load the module nft_ct, " + orRun}
	needFib      = &need{"nftables fib", "load the module nft_fib_inet, " + orRun}
	needReject   = &need{"nftables reject", "load the module nft_reject_inet, " + orRun}
	needSocket   = &need{"nftables socket", "load the module nft_socket, " + orRun}
	needCgroupv2 = &need{
		"nftables socket cgroupv2",
		"load the module nft_socket, of Linux 5.13 or later; leave out what is chosen by cgroup",
	}
)

func (s *nfSet) needs() []*need {
	if s.timeout || s.dynamic {
		return []*need{needTimeout}
	}
	return []*need{needConcat}
}

func (c *nfChain) needs(fam uint8) []*need {
	switch {
	case c.kind == "":
		return nil
	case fam == unix.NFPROTO_NETDEV:
		return []*need{needEgress}
	case c.kind == "route":
		return []*need{needRoute}
	case c.kind == "nat":
		return []*need{needNAT}
	}
	return []*need{needInet}
}

func (t term) needs() (out []*need) {
	for _, e := range t.exprs {
		switch e := e.(type) {
		case *expr.Ct:
			out = append(out, needCt)
		case *expr.Fib:
			out = append(out, needFib)
		case *expr.NAT:
			out = append(out, needNAT)
		case *expr.Reject:
			out = append(out, needReject)
		case *expr.Socket:
			if e.Key == expr.SocketKeyCgroupv2 {
				out = append(out, needCgroupv2)
			} else {
				out = append(out, needSocket)
			}
		case *expr.Objref:
			out = append(out, needObjref)
		}
	}
	return out
}

// lacking returns what the kernel does not support if it refuses msgs[failed]: one of the things that this message
// needs and no message before it needed. nil: it refuses for another reason.
func lacking(msgs []nfMsg, failed int, err error) *need {
	switch {
	case failed < 0:
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) { // nothing in the kernel accepts a batch
			return needTables
		}
		return nil
	case failed >= len(msgs):
		return nil
	}
	m := &msgs[failed]
	switch {
	case m.op == unix.NFT_MSG_NEWTABLE && noTables(err):
		return needInet
	case errors.Is(err, unix.ENOENT) && m.op == unix.NFT_MSG_NEWCHAIN && m.fam == unix.NFPROTO_NETDEV:
		return nil // the device disappeared
	case errors.Is(err, unix.ENOENT),
		errors.Is(err, unix.EOPNOTSUPP),
		errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, unix.EINVAL),
		errors.Is(err, unix.EPROTONOSUPPORT):
	default:
		return nil
	}
	had := map[*need]bool{}
	for _, before := range msgs[:failed] {
		for _, n := range before.needs {
			had[n] = true
		}
	}
	for _, n := range m.needs {
		if !had[n] {
			return n
		}
	}
	return nil
}

// lackError returns the error for a missing part, in one line.
func lackError(n *need) error {
	return fmt.Errorf("cannot close the host: this kernel has no %s: %s", n.what, n.how)
}

// noTables reports whether err, from a query or from opening a socket, means that the kernel has no nf_tables at all.
func noTables(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) ||
		errors.Is(err, unix.EPROTONOSUPPORT)
}
