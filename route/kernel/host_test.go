package kernel

import (
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// testTUN is a persistent TUN, as the daemon makes it; the file is its reader.
func testTUN(t *testing.T) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip("no TUN device: ", err)
	}
	ifr, _ := unix.NewIfreq("viasocks0")
	ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		t.Error(err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		t.Error(err)
	}
	ip(t, "link set viasocks0 addrgenmode none up", "addr replace 198.18.0.1/32 dev viasocks0")
	if readSysctl("net/ipv6/conf/viasocks0/disable_ipv6") == "0" {
		ip(t, "addr replace fd76:6961:736f:636b::1/128 dev viasocks0 nodad")
	}
	return os.NewFile(uintptr(fd), "tun")
}

func testConfig(t *testing.T) Config {
	return Config{
		TUN: "viasocks0", TUNAddrs: []netip.Addr{netip.MustParseAddr("198.18.0.1"),
			netip.MustParseAddr("fd76:6961:736f:636b::1")},
		Table: 30323, Marks: MarksFrom(0x76000000, 0xff000000), Dir: t.TempDir(),
		Upstreams: []Endpoint{
			{unix.IPPROTO_TCP, netip.MustParseAddrPort("198.51.100.7:1080")},
			{0, netip.MustParseAddrPort("[2001:db8:1::7]:1080")},
			{unix.IPPROTO_UDP, netip.MustParseAddrPort("198.51.100.8:0")},
		},
		Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func nft(t *testing.T, args ...string) string {
	t.Helper()
	b, err := exec.Command("nft", args...).CombinedOutput()
	if err != nil {
		t.Errorf("nft %s: %v: %s", strings.Join(args, " "), err, b)
	}
	return string(b)
}

// up does all until Run.
func up(t *testing.T, c Config) (*Host, *os.File) { t.Helper(); return upOwned(t, c, true) }

// upOwned is up, and if owned is false others can change the tables.
func upOwned(t *testing.T, c Config, owned bool) (*Host, *os.File) {
	t.Helper()
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if !owned {
		h.owned = 0
	}
	if err := h.Shut(); err != nil {
		t.Fatal(err)
	}
	tun := testTUN(t)
	if err := h.Steer(); err != nil {
		t.Fatal(err)
	}
	return h, tun
}

func down(t *testing.T, h *Host) {
	t.Helper()
	for _, f := range []func() error{h.Unsteer, h.Open, h.Close} {
		if err := f(); err != nil {
			t.Error(err)
		}
	}
}

// setSysctls gives each of the keys a value.
func setSysctls(t *testing.T, value string, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if err := writeSysctl(k, value); err != nil {
			t.Fatal(err)
		}
	}
}

// forwardAll has the host forward both families.
func forwardAll(t *testing.T) {
	t.Helper()
	setSysctls(t, "1", "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
}

// strictPaths has the kernel check the paths of sources strictly.
func strictPaths(t *testing.T) {
	t.Helper()
	setSysctls(t, "1", "net/ipv4/conf/all/rp_filter", "net/ipv4/conf/eth0/rp_filter", "net/ipv4/conf/default/rp_filter")
}

// checkRestored wants the host to be as it was before.
func checkRestored(t *testing.T, before string) {
	t.Helper()
	if after := state(t); after != before {
		t.Errorf("not as it was:\n%s\n--- before\n%s", after, before)
	}
}

func TestUpAndDown(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		before := state(t)
		c := testConfig(t)
		h, tun := up(t, c)
		t.Log(state(t))
		down(t, h)
		tun.Close()
		checkRestored(t, before)
	})
}
