package daemon

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPoolIsFree(t *testing.T) {
	fake := parse(t, "--proxy", "socks5://127.0.0.1:1", "--dns", "fake", "--dns-pool", "198.19.0.0/16")
	for _, tt := range []struct {
		addr string
		free bool
	}{
		{"192.0.2.1/24", true},
		{"198.18.0.1/32", true},              // the TUN's own
		{"fd76:6961:736f:636b::1/128", true}, // likewise
		{"198.18.7.7/24", true},              // outside the part that is the pool
		{"198.18.7.7/8", false},              // its network is not
		{"fd76::1/16", false},
		{"198.19.0.1/32", false},
		{"fd76:6961:736f:636b::9/64", false},
	} {
		p := netip.MustParsePrefix(tt.addr)
		addrs := func() ([]net.Addr, error) {
			return []net.Addr{&net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}, nil
		}
		err := poolIsFree(fake, addrs)
		if (err == nil) != tt.free || err != nil && !strings.Contains(err.Error(), p.Addr().String()) {
			t.Errorf("%s: %v", tt.addr, err)
		}
		if err := poolIsFree(parse(t, "--proxy", "socks5://127.0.0.1:1", "--dns", "tcp://192.0.2.53"), addrs); err != nil {
			t.Errorf("%s without fake addresses: %v", tt.addr, err)
		}
	}
}

// TestPoolFile: a name keeps its address over a restart, and a damaged file stops nothing.
func TestPoolFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "names")
	cfg := parse(t, "--proxy", "socks5://127.0.0.1:1", "--dns", "fake", "--dns-pool-file", file)
	p, err := newPool(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	p.Give([]byte("first.example"))
	a4, _, _ := p.Give([]byte("www.example.com"))
	if err := p.Save(file); err != nil {
		t.Fatal(err)
	}
	if p, err = newPool(cfg, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if name, ok := p.AppendName(nil, a4); !ok || string(name) != "www.example.com" {
		t.Errorf("after a restart %v stands for %q", a4, name)
	}
	if err := os.WriteFile(file, []byte("garbage\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := newPool(cfg, slog.New(slog.DiscardHandler)); err != nil || p.Stats().Names != 0 {
		t.Errorf("with a damaged file: %v", err)
	}
}
