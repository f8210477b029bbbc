package incoming

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/viasocks/viasocks/route/portmap"
	"github.com/viasocks/viasocks/socks"
	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/stack/testkit"
)

// A program that asks for a port gets a BIND for it, which ends with the mapping; ports of the user stay.
func TestMapper(t *testing.T) {
	s := &fakeServer{}
	m, _ := start(t, s)
	b := NewMapper(m, &Spec{})
	if _, state := b.Map(ask(portmap.UDP, 7000, 7000)); state != portmap.Unsupported {
		t.Errorf("UDP: %v", state)
	}
	if _, state := b.Map(ask(portmap.TCP, 7000, 7001)); state != portmap.Wait {
		t.Errorf("a new port: %v", state)
	}
	testkit.Eventually(t, "the port", func() bool {
		outer, state := b.Map(ask(portmap.TCP, 7000, 9))
		return state == portmap.Works && outer == at(7001)
	})
	b.Unmap(portmap.TCP, appAt(7000))
	b.Unmap(portmap.TCP, appAt(6881))
	testkit.Eventually(t, "the user's port", func() bool { return m.Outer(6881) == at(6881) })
	if n := len(m.Ports()); n != 1 {
		t.Errorf("%d ports are left", n)
	}
	for i := range maxPorts {
		b.Map(ask(portmap.TCP, uint16(8000+i), 0))
	}
	if _, state := b.Map(ask(portmap.TCP, 9000, 0)); state != portmap.Full {
		t.Errorf("over the limit: %v", state)
	}
	closed := NewMapper(m, nil)
	if _, state := closed.Map(ask(portmap.TCP, 9000, 0)); state != portmap.Forbidden {
		t.Errorf("a port that the user does not allow: %v", state)
	}
	if outer, state := closed.Map(ask(portmap.TCP, 6881, 0)); state != portmap.Works || outer != at(6881) {
		t.Errorf("a port that the user allows: %v, %v", outer, state)
	}
}

// The address is known before any port is, and a proxy that cannot listen is reported as such.
func TestMapperAddress(t *testing.T) {
	s := &fakeServer{}
	m, _ := start(t, s)
	m.Remove(6881)
	b := NewMapper(m, &Spec{})
	testkit.Eventually(t, "the address", func() bool {
		a, state := b.External()
		return state == portmap.Works && a == at(0).Addr()
	})
	for err, want := range map[error]portmap.State{
		socks.ReplyCommandNotSupported: portmap.Unsupported, errors.New("broken"): portmap.Failed,
	} {
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
		b := NewMapper(m, &Spec{})
		testkit.Eventually(t, "the error", func() bool { _, state := b.External(); return state == want })
		b.Map(ask(portmap.TCP, 7000, 0))
		testkit.Eventually(
			t,
			"the error of a port",
			func() bool { _, state := b.Map(ask(portmap.TCP, 7000, 0)); return state == want },
		)
		m.Remove(7000)
	}
}

// A forwarded port is told to one port of the program at a time, for each protocol, and needs no BIND.
func TestForwarded(t *testing.T) {
	s := &fakeServer{}
	m, _ := start(t, s)
	told := netip.MustParseAddrPort("203.0.113.9:50000")
	b := NewMapper(m, nil, Forwarded{Addr: told.Addr(), Port: told.Port()})
	for _, proto := range []portmap.Proto{portmap.TCP, portmap.UDP} {
		for range 2 {
			if outer, state := b.Map(ask(proto, 7000, 1)); outer != told || state != portmap.Works {
				t.Errorf("%v: %v, %v", proto, outer, state)
			}
		}
	}
	if _, state := b.Map(ask(portmap.TCP, 7001, 0)); state != portmap.Forbidden {
		t.Errorf("a second port: %v", state)
	}
	if _, state := b.Map(ask(portmap.UDP, 7001, 0)); state != portmap.Unsupported {
		t.Errorf("a second port of UDP: %v", state)
	}
	b.Unmap(portmap.UDP, appAt(7000))
	if outer, _ := b.Map(ask(portmap.UDP, 7001, 0)); outer != told {
		t.Errorf("a port that is free again: %v", outer)
	}
	if got := b.Told(); len(got) != 2 || got[0].Inner != 7000 || got[1].Inner != 7001 {
		t.Errorf("%+v", got)
	}
	if a, state := b.External(); a != told.Addr() || state != portmap.Works {
		t.Errorf("the address: %v, %v", a, state)
	}
	testkit.Eventually(
		t,
		"the port of --listen",
		func() bool { outer, _ := b.Map(ask(portmap.TCP, 6881, 0)); return outer == at(6881) },
	)
	asked := NewMapper(m, nil, Forwarded{Port: 50000}) // the proxy is asked for the address
	testkit.Eventually(t, "the port", func() bool {
		outer, state := asked.Map(ask(portmap.UDP, 7000, 0))
		return state == portmap.Works && outer == netip.AddrPortFrom(at(0).Addr(), 50000)
	})
}

// appAt is an endpoint of the program.
func appAt(port uint16) netip.AddrPort { return netip.AddrPortFrom(flow.TUN4, port) }

func ask(proto portmap.Proto, port, outer uint16) portmap.Want {
	return portmap.Want{Proto: proto, App: appAt(port), Outer: outer}
}
