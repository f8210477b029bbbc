package kernel

import (
	"bytes"
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fakeNF is the kernel's nftables without a part of it: a message that refuse names is answered with its error, and the
// batch that it is in does not come to the true kernel, which does all or nothing as well.
type fakeNF struct {
	nfConn
	refuse  func(op uint16, fam uint8, data []byte) unix.Errno
	answers [][]byte
}

func (f *fakeNF) Send(b []byte) error {
	f.answers = nil
	eachMessage(b, func(h unix.NlMsghdr, data []byte) bool {
		var errno unix.Errno
		if h.Type>>8 == unix.NFNL_SUBSYS_NFTABLES && len(data) >= 4 {
			errno = f.refuse(h.Type&0xff, data[0], data[4:])
		} else if h.Type == unix.NFNL_MSG_BATCH_BEGIN {
			errno = f.refuse(h.Type, 0, nil)
		}
		if errno != 0 {
			a := header(nil, unix.NLMSG_ERROR, 0, h.Seq, 0, 0)[:unix.NLMSG_HDRLEN]
			a = binary.NativeEndian.AppendUint32(a, uint32(-int32(errno)))
			a = append(a, make([]byte, unix.NLMSG_HDRLEN)...)
			setLen(a, 0)
			f.answers = append(f.answers, a)
		}
		return true
	})
	if f.answers != nil {
		return nil
	}
	return f.nfConn.Send(b)
}

func (f *fakeNF) Receive(b []byte, flags int) (int, error) {
	if f.answers == nil {
		return f.nfConn.Receive(b, flags)
	}
	if len(f.answers) == 0 {
		return 0, unix.EAGAIN
	}
	n := copy(b, f.answers[0])
	f.answers = f.answers[1:]
	return n, nil
}

// lack has the next Hosts meet a kernel that refuses.
func lack(t *testing.T, refuse func(op uint16, fam uint8, data []byte) unix.Errno) {
	true := openNF
	openNF = func() (*nfSocket, error) {
		if refuse == nil {
			return nil, unix.EPROTONOSUPPORT
		}
		s, err := true()
		if err == nil {
			s.conn = &fakeNF{nfConn: s.conn, refuse: refuse}
		}
		return s, err
	}
	ends[t] = append(ends[t], func() { openNF = true })
}

// withExpr refuses rules that have an expression, as a kernel without its module does.
func withExpr(name string, errno unix.Errno) func(uint16, uint8, []byte) unix.Errno {
	return func(op uint16, _ uint8, data []byte) unix.Errno {
		if op == unix.NFT_MSG_NEWRULE && bytes.Contains(data, attrString(unix.NFTA_EXPR_NAME, name)) {
			return errno
		}
		return 0
	}
}

// What a kernel lacks is said in one line, with what can be done, and nothing is touched. The errors are those that
// Linux 6.1 gave without the modules in question.
func TestLacking(t *testing.T) {
	path, _ := testCgroup(t, "lack")
	group := func(c *Config) { c.Exclude.Cgroups = []string{path} }
	for _, tt := range []struct {
		name   string
		refuse func(op uint16, fam uint8, data []byte) unix.Errno
		want   []string
		config func(*Config)
	}{
		{"no nfnetlink", nil, []string{"no nf_tables:", "nf_tables,"}, nil},
		{"no nf_tables", func(op uint16, _ uint8, _ []byte) unix.Errno {
			if op == unix.NFNL_MSG_BATCH_BEGIN {
				return unix.EOPNOTSUPP
			}
			return unix.EINVAL
		}, []string{"no nf_tables:", "nf_tables,"}, nil},
		{"nf_tables went", func(op uint16, _ uint8, _ []byte) unix.Errno {
			if op == unix.NFNL_MSG_BATCH_BEGIN {
				return unix.EOPNOTSUPP
			}
			return 0
		}, []string{"no nf_tables:"}, nil},
		{"no inet", func(op uint16, fam uint8, data []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWCHAIN && fam == unix.NFPROTO_INET &&
				bytes.Contains(data, attrString(unix.NFTA_CHAIN_TYPE, "filter")) {
				return unix.ENOENT
			}
			return 0
		}, []string{"both families", "CONFIG_NF_TABLES_INET"}, nil},
		{"no inet tables", func(op uint16, fam uint8, _ []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWTABLE && fam == unix.NFPROTO_INET {
				return unix.EAFNOSUPPORT
			}
			return 0
		}, []string{"both families", "CONFIG_NF_TABLES_INET"}, nil},
		{"no route chains", func(op uint16, _ uint8, data []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWCHAIN && bytes.Contains(data, attrString(unix.NFTA_CHAIN_TYPE, "route")) {
				return unix.ENOENT
			}
			return 0
		}, []string{"chains of type route"}, nil},
		{"no counters", func(op uint16, _ uint8, _ []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWOBJ {
				return unix.ENOENT
			}
			return 0
		}, []string{"nft_counter"}, nil},
		{"no objref", withExpr("objref", unix.ENOENT), []string{"nft_objref"}, nil},
		{"no ct", withExpr("ct", unix.ENOENT), []string{"nft_ct,"}, nil},
		{"no fib", withExpr("fib", unix.ENOENT), []string{"nft_fib_inet,"}, nil},
		{"no reject", withExpr("reject", unix.ENOENT), []string{"nft_reject_inet,"}, nil},
		{"no socket", withExpr("socket", unix.ENOENT), []string{"socket cgroupv2", "nft_socket"}, group},
		{"no cgroupv2", withExpr("socket", unix.EOPNOTSUPP), []string{"socket cgroupv2", "nft_socket"}, group},
		{"no egress", func(op uint16, fam uint8, data []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWCHAIN && fam == unix.NFPROTO_NETDEV &&
				bytes.Contains(data, attrString(unix.NFTA_CHAIN_TYPE, "filter")) {
				return unix.EOPNOTSUPP
			}
			return 0
		}, []string{"netdev egress", "--strict"}, func(c *Config) { c.Strict = true }},
		{"no privilege", func(op uint16, _ uint8, _ []byte) unix.Errno {
			if op == unix.NFNL_MSG_BATCH_BEGIN {
				return unix.EPERM
			}
			return 0
		}, []string{"CAP_NET_ADMIN"}, nil},
	} {
		inNamespace(t, func(t *testing.T) {
			c := testConfig(t)
			if tt.config != nil {
				tt.config(&c)
			}
			before := state(t)
			lack(t, tt.refuse)
			h, err := New(c)
			if err == nil {
				if err = h.Shut(); err == nil {
					t.Errorf("%s: closed", tt.name)
				}
				if err := h.Open(); err != nil { // as who failed to start does
					t.Errorf("%s: open: %v", tt.name, err)
				}
				h.Close()
			}
			t.Logf("%s: %v", tt.name, err)
			for _, want := range append(tt.want, "cannot close the host: ") {
				if err != nil && (!strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n")) {
					t.Errorf("%s: %v, want one line with %q", tt.name, err, want)
				}
			}
			if after := state(t); after != before {
				t.Errorf("%s: something was touched: %s", tt.name, difference(before, after))
			}
			if _, err := Undo(c); err != nil {
				t.Errorf("%s: undo: %v", tt.name, err)
			}
			if f, _ := filepath.Glob(filepath.Join(c.Dir, "*")); len(f) > 0 {
				t.Errorf("%s: %v is left", tt.name, f)
			}
		})
	}
}

// What is of use where it can be had does without.
func TestLackingOfLess(t *testing.T) {
	path, _ := testCgroup(t, "lack")
	for _, tt := range []struct {
		name   string
		refuse func(op uint16, fam uint8, data []byte) unix.Errno
		ok     func(h *Host) bool
	}{
		{"no ARP", func(op uint16, fam uint8, _ []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWCHAIN && fam == unix.NFPROTO_ARP {
				return unix.ENOENT
			}
			return 0
		}, func(h *Host) bool { return h.noARP }},
		{"no bridge", func(op uint16, fam uint8, _ []byte) unix.Errno {
			if op == unix.NFT_MSG_NEWTABLE && fam == unix.NFPROTO_BRIDGE {
				return unix.EAFNOSUPPORT
			}
			return 0
		}, func(h *Host) bool { return h.noBridge && !h.noARP }},
		{"no owners", func(op uint16, _ uint8, data []byte) unix.Errno {
			if flags := attrs(data)[unix.NFTA_TABLE_FLAGS]; op == unix.NFT_MSG_NEWTABLE && binary.BigEndian.Uint32(flags) != 0 {
				return unix.EOPNOTSUPP
			}
			return 0
		}, func(h *Host) bool { return h.owned == 0 }},
		{"no cgroups for our own sockets", withExpr("socket", unix.EOPNOTSUPP), func(h *Host) bool {
			return h.c.OwnCgroup == ""
		}},
	} {
		inNamespace(t, func(t *testing.T) {
			w := newWorld(t)
			c := testConfig(t)
			c.OwnCgroup = path
			before := state(t)
			lack(t, tt.refuse)
			h, tun := up(t, c)
			if !tt.ok(h) {
				t.Errorf("%s: not noticed", tt.name)
			}
			w.mustBeClosed(t, "steered")
			down(t, h)
			tun.Close()
			if after := state(t); after != before {
				t.Errorf("%s: not as it was: %s", tt.name, difference(before, after))
			}
		})
	}
}

// noIPv6 is rtnetlink of a kernel that was started with ipv6.disable=1: this is what Linux 6.1 answers then.
type noIPv6 struct {
	routing
	t    *testing.T
	came bool
}

func (k *noIPv6) no(family int, asked string) bool {
	if k.came || family != unix.AF_INET6 {
		return false
	}
	if asked != "RuleList" {
		k.t.Errorf("%s of IPv6", asked)
	}
	return true
}

func (k *noIPv6) RuleList(family int) ([]netlink.Rule, error) {
	if k.no(family, "RuleList") {
		return nil, unix.EAFNOSUPPORT
	}
	return k.routing.RuleList(family)
}

func (k *noIPv6) RuleAdd(r *netlink.Rule) error {
	if k.no(r.Family, "RuleAdd") {
		return unix.EAFNOSUPPORT
	}
	return k.routing.RuleAdd(r)
}

func (k *noIPv6) RouteListFiltered(family int, r *netlink.Route, mask uint64) ([]netlink.Route, error) {
	if k.no(family, "RouteListFiltered") {
		return nil, unix.EOPNOTSUPP
	}
	return k.routing.RouteListFiltered(family, r, mask)
}

func (k *noIPv6) RouteReplace(r *netlink.Route) error {
	if k.no(r.Family, "RouteReplace") {
		return unix.EOPNOTSUPP
	}
	return k.routing.RouteReplace(r)
}

// replaceRouting has the next Hosts meet k, until the function that it returns is called.
func (k *noIPv6) replaceRouting() (restore func()) {
	true := openRouting
	openRouting = func() (_ routing, err error) {
		k.routing, err = true()
		return k, err
	}
	return func() { openRouting = true }
}

// A host that has no IPv6, by ipv6.disable=1 or by the setting, comes up for IPv4.
func TestHostWithoutIPv6(t *testing.T) {
	for _, boot := range []bool{true, false} {
		inNamespace(t, func(t *testing.T) {
			w := newWorld(t)
			setSysctls(t, "1", "net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6")
			settled(t)
			before := state(t)
			fake := &noIPv6{t: t}
			if boot {
				defer fake.replaceRouting()()
			}
			h, err := New(testConfig(t))
			if err != nil {
				t.Fatal(err)
			}
			lines, err := h.Plan()
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range lines {
				if boot && strings.HasPrefix(l, "ip -6") {
					t.Errorf("planned: %s", l)
				}
			}
			if err := h.Shut(); err != nil {
				t.Fatal(err)
			}
			w.mustBeClosed(t, "shut")
			tun := testTUN(t)
			if err := h.Steer(); err != nil {
				t.Fatal(err)
			}
			w.mustBeClosed(t, "steered")
			if s := ip(t, "-6 rule"); strings.Contains(s, "proto 118") == boot {
				t.Errorf("IPv6 rules: %s", s)
			}
			if err := (probe{typ: unix.SOCK_DGRAM, dst: far4, port: 7777}).send(); err != nil {
				t.Errorf("IPv4: %v", err)
			}
			if boot { // its module comes
				fake.came = true
				if _, err := h.reconcile(); err != nil {
					t.Error(err)
				}
				if s := ip(t, "-6 rule"); !strings.Contains(s, "proto 118") {
					t.Errorf("IPv6 rules: %s", s)
				}
			}
			down(t, h)
			tun.Close()
			if after := state(t); after != before {
				t.Errorf("not as it was: %s", difference(before, after))
			}
		})
	}
}
