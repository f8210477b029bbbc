package kernel

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func options() Options {
	return Options{TUN: "viasocks0", Table: 30323, Mark: 0x76000000, Mask: 0xff000000}
}

// way gives the device that a packet to addr would take, or the error's first words.
func way(t *testing.T, args string) string {
	t.Helper()
	b, err := exec.Command("ip", strings.Fields("route get "+args)...).CombinedOutput()
	if err != nil {
		return strings.TrimSpace(string(b))
	}
	words := strings.Fields(string(b))
	for i, w := range words {
		if w == "dev" {
			return words[i+1]
		}
	}
	return string(b)
}

func TestSteer(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		before := state(t)
		s, err := Steer(options())
		if err != nil {
			t.Error(err)
			return
		}
		for _, tt := range []struct{ to, want string }{
			{"203.0.113.1", "viasocks0"},
			{"198.51.100.9", "viasocks0"}, // connected but public
			{"2001:db8:ffff::1", "viasocks0"},
			{"192.168.7.9", "br0"},
			{"fd12:3456::9", "br0"},
			{"192.168.8.9", "viasocks0"}, // private but elsewhere
			{"203.0.113.1 mark 0x76000000", "eth0"},
			{"203.0.113.1 mark 0x76000001", "eth0"}, // others' bits beside ours
			{"203.0.113.1 mark 0x77000000", "viasocks0"},
			{"203.0.113.1 mark 0x1", "viasocks0"},
			{"2001:db8:ffff::1 mark 0x76000000", "eth0"},
			{"192.168.7.9 ipproto udp dport 53", "viasocks0"},
			{"192.168.7.9 ipproto tcp dport 53", "viasocks0"},
			{"192.168.7.9 ipproto tcp dport 54", "br0"},
			{"fd12:3456::9 ipproto udp dport 53", "viasocks0"},
			{"203.0.113.1 ipproto udp dport 53 mark 0x76000000", "eth0"},
			{"127.0.0.1 ipproto udp dport 53", "lo"},
			{"198.51.100.2", "lo"},
		} {
			if got := way(t, tt.to); got != tt.want {
				t.Errorf("%s goes by %q, want %q", tt.to, got, tt.want)
			}
		}
		if _, err := Steer(options()); err == nil || !strings.Contains(err.Error(), "another viasocks steers it") {
			t.Errorf("a second one: %v", err)
		}
		if got := way(t, "203.0.113.1"); got != "viasocks0" {
			t.Errorf("the second one touched the first: %s", got)
		}
		for range 2 {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		if after := state(t); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// A step in the middle fails: nothing is left, whichever it was.
func TestSteerFails(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		defer func() { step = func() error { return nil } }()
		before := state(t)
		boom := errors.New("boom")
		steps := 0
		for fail := 1; ; fail++ {
			n := 0
			step = func() error {
				if n++; n == fail {
					return boom
				}
				return nil
			}
			s, err := Steer(options())
			if err == nil {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				steps = n
				break
			}
			if !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "cannot steer the host: cannot add the IPv") || strings.Contains(err.Error(), "\n") {
				t.Error(err)
			}
			if after := state(t); after != before {
				t.Errorf("step %d failed: before:\n%s\nafter:\n%s", fail, before, after)
			}
		}
		if steps < 14 { // two families: a route, five rules and the networks
			t.Errorf("only %d steps were tried", steps)
		}
	})
}

// What a killed daemon leaves, with its TUN gone: the next one takes it away.
func TestSteerAfterKill(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		before := state(t)
		s, err := Steer(options())
		if err != nil {
			t.Error(err)
			return
		}
		s.events.Close() // so that the fd is not missed below; the rules stay
		<-s.watched
		s.h.Close()
		ip(t, "link del viasocks0",
			"link add viasocks0 type veth peer name tunp", "link set viasocks0 addrgenmode none up", "link set tunp addrgenmode none up",
			"addr add 198.18.0.1/32 dev viasocks0", "addr add fd76:6961:736f:636b::1/128 dev viasocks0 nodad")
		if !strings.Contains(ip(t, "rule"), "lookup 30323") {
			t.Error("the rules went with the device: this test proves nothing")
		}
		var log bytes.Buffer
		o := options()
		o.Table++ // whatever the number was
		o.Log = slog.New(slog.NewTextHandler(&log, nil))
		if s, err = Steer(o); err != nil {
			t.Error(err)
			return
		}
		if !strings.Contains(log.String(), "removed the ip rules") {
			t.Error(log.String())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if after := state(t); normal(after) != normal(before) {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// normal is without the devices: one that was made again has other numbers.
func normal(s string) string {
	s, _, _ = strings.Cut(s, "# ip addr")
	return s
}

func TestSteerForeignTable(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		for _, tt := range []struct{ add, del, want string }{
			{"route add 203.0.113.0/24 dev eth0 table 30323", "route del 203.0.113.0/24 dev eth0 table 30323",
				"cannot steer the host: table 30323 is in use by somebody else: see 'ip route show table 30323', and choose another with --table"},
			{"-6 rule add pref 77 lookup 30323", "-6 rule del pref 77 lookup 30323",
				"cannot steer the host: an ip rule of somebody else leads to table 30323: see 'ip rule', and choose another with --table"},
		} {
			ip(t, tt.add)
			before := state(t)
			if _, err := Steer(options()); err == nil || err.Error() != tt.want {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if after := state(t); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			ip(t, tt.del)
		}
		o := options()
		o.TUN = "nosuch0"
		if _, err := Steer(o); err == nil || !strings.HasPrefix(err.Error(), "cannot steer the host: no device nosuch0") {
			t.Error(err)
		}
	})
}

// Rules for private networks follow the addresses; a network that is not private gets none, however it is announced.
func TestNetworksFollowAddresses(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		before := state(t)
		s, err := Steer(options())
		if err != nil {
			t.Error(err)
			return
		}
		defer s.Close()
		until := func(to, want string) {
			t.Helper()
			for range 200 {
				if way(t, to) == want {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
			t.Errorf("%s goes by %s, want %s", to, way(t, to), want)
		}
		ip(t, "addr add 10.9.0.1/16 dev eth0", "addr add 128.0.0.1/1 dev br0", "addr add fd99::1/64 dev eth0 nodad")
		until("10.9.9.9", "eth0")
		until("fd99::9", "eth0")
		until("203.0.113.1", "viasocks0")
		ip(t, "addr del 10.9.0.1/16 dev eth0", "addr del 128.0.0.1/1 dev br0", "addr del fd99::1/64 dev eth0")
		until("10.9.9.9", "viasocks0")
		until("fd99::9", "viasocks0")
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if after := state(t); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// A TUN without IPv6 must not mean that IPv6 goes past the proxy.
func TestNoIPv6OnTUN(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		if out, err := exec.Command("sysctl", "-qw", "net.ipv6.conf.viasocks0.disable_ipv6=1").CombinedOutput(); err != nil {
			t.Skipf("cannot switch IPv6 off: %v: %s", err, out)
		}
		before := state(t)
		s, err := Steer(options())
		if err != nil {
			t.Error(err)
			return
		}
		if got := way(t, "2001:db8:ffff::1"); !strings.Contains(got, "No route to host") {
			t.Errorf("IPv6 goes by %s", got)
		}
		if got := way(t, "203.0.113.1"); got != "viasocks0" {
			t.Errorf("IPv4 goes by %s", got)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if after := state(t); after != before {
			t.Errorf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

func TestWarnsOfReversePath(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		var log bytes.Buffer
		o := options()
		o.Log = slog.New(slog.NewTextHandler(&log, nil))
		for _, strict := range []bool{false, true} {
			if strict {
				if err := os.WriteFile("/proc/sys/net/ipv4/conf/eth0/rp_filter", []byte("1"), 0o644); err != nil {
					t.Skipf("cannot set it: %v", err)
				}
			}
			s, err := Steer(o)
			if err != nil {
				t.Error(err)
				return
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if strings.Contains(log.String(), "conf.eth0.rp_filter=2") != strict {
				t.Errorf("strict %v: %s", strict, &log)
			}
		}
	})
}

func TestConnected(t *testing.T) {
	for _, tt := range []struct {
		in, want string // empty: none
	}{
		{"192.168.7.1/24", "192.168.7.0/24"},
		{"10.0.0.1/8", "10.0.0.0/8"},
		{"10.0.0.1/7", ""}, // wider than what is private
		{"0.0.0.1/0", ""},
		{"172.16.0.1/11", ""},
		{"172.31.255.1/30", "172.31.255.0/30"},
		{"192.168.7.1/32", ""},
		{"100.64.0.1/10", ""},
		{"198.51.100.1/24", ""},
		{"169.254.3.4/16", "169.254.0.0/16"},
		{"fe80::1/64", "fe80::/64"},
		{"fd00::1/8", "fd00::/8"},
		{"fc00::1/6", ""},
		{"fd00::1/128", ""},
		{"2001:db8::1/64", ""},
	} {
		ip, n, err := net.ParseCIDR(tt.in)
		if err != nil {
			t.Fatal(err)
		}
		n.IP = ip
		if p, ok := connected(n); ok != (tt.want != "") || ok && p != netip.MustParsePrefix(tt.want) {
			t.Errorf("%s: %v, %v, want %q", tt.in, p, ok, tt.want)
		}
	}
	if _, ok := connected(nil); ok {
		t.Error("nil is a network")
	}
}
