package stack

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

// missCounter stands between the device and gVisor. It counts the addresses of IPv4 packets that gVisor's table does not
// hold: for each of them gVisor walks the whole table, once or twice.
type missCounter struct {
	gstack.NetworkDispatcher
	ns     *gstack.Stack
	missed atomic.Int64
}

func (w *missCounter) DeliverNetworkPacket(proto tcpip.NetworkProtocolNumber, pkt *gstack.PacketBuffer) {
	if proto == header.IPv4ProtocolNumber {
		h := header.IPv4(pkt.Data().AsRange().ToSlice())
		for _, a := range []tcpip.Address{h.SourceAddress(), h.DestinationAddress()} {
			if !inTable(w.ns, a) {
				w.missed.Add(1)
			}
		}
	}
	w.NetworkDispatcher.DeliverNetworkPacket(proto, pkt)
}

// inTable reports whether gVisor's table holds a. One that it does not hold is made for the question.
func inTable(ns *gstack.Stack, a tcpip.Address) bool {
	ep, err := ns.GetNetworkEndpoint(nicID, ipv4.ProtocolNumber)
	if err != nil {
		panic(err.String())
	}
	held := ep.(gstack.AddressableEndpoint).AcquireAssignedAddress(a, true, gstack.NeverPrimaryEndpoint, true)
	return !held.Temporary()
}

// Neither a round trip nor a new connection asks gVisor for an address that its table does not hold, and the destinations
// leave the table when their connections have ended.
func TestAddressesAreNotWalked(t *testing.T) {
	p := newPair(t, offAll, Config{})
	e := p.st.engine.Load()
	w := &missCounter{NetworkDispatcher: e.link.disp, ns: e.ns}
	e.link.disp = w // no frame has come yet: the app was not told to send one

	const peers = 100
	addr := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}) }
	var apps []*gonet.TCPConn
	var ups []*testConn
	for i := range peers {
		app, up := p.connect(netip.AddrPortFrom(addr(i), 80))
		apps, ups = append(apps, app), append(ups, up)
	}
	b := make([]byte, 1)
	for range 50 {
		if _, err := apps[0].Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := ups[0].Read(b); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.missed.Load(); n != 0 {
		t.Errorf("gVisor walked its table for %d addresses, in %d connections and 50 writes", n, peers)
	}
	for i, up := range ups {
		if !inTable(e.ns, addrTo(addr(i))) {
			t.Fatalf("the table lost %v, which a connection uses", addr(i))
		}
		up.st.Close()
	}
	waitFor(t, "the destinations of ended connections to leave the table", func() bool {
		for i := range peers {
			if inTable(e.ns, addrTo(addr(i))) {
				return false
			}
		}
		return true
	})
	if !inTable(e.ns, addrTo(appIP4)) {
		t.Error("the table lost the program's own address")
	}
}

// Handshakes to one destination that overlap each find it in the table.
func TestHeldAddress(t *testing.T) {
	p := newPair(t, 0, Config{})
	e := p.st.engine.Load()
	own, dst := [4]byte{192, 0, 2, 1}, [4]byte{192, 0, 2, 2}
	e.source(own)
	outer := e.holdAddress(dst)
	e.holdAddress(dst)()
	e.holdAddress(own)()
	if !inTable(e.ns, tcpip.AddrFrom4(dst)) || !inTable(e.ns, tcpip.AddrFrom4(own)) {
		t.Error("an address left the table while it was held")
	}
	outer()
	if inTable(e.ns, tcpip.AddrFrom4(dst)) {
		t.Error("an address stayed in the table after its release")
	}
}

// However many addresses send, gVisor's table keeps few of them, and one that goes on sending gets its place.
func TestSourcesAreBounded(t *testing.T) {
	p := newPair(t, 0, Config{})
	e := p.st.engine.Load()
	var a [4]byte
	for i := range 100_000 {
		binary.BigEndian.PutUint32(a[:], 10<<24|uint32(i))
		e.source(a)
	}
	kept := 0
	for i := range 100_000 {
		binary.BigEndian.PutUint32(a[:], 10<<24|uint32(i))
		if inTable(e.ns, tcpip.AddrFrom4(a)) {
			kept++
		}
	}
	if kept != maxSources {
		t.Errorf("%d addresses are kept, not %d", kept, maxSources)
	}
	a = [4]byte{192, 0, 2, 1}
	for range replaceEvery {
		e.source(a)
	}
	if !inTable(e.ns, tcpip.AddrFrom4(a)) {
		t.Error("an address that goes on sending never got a place")
	}
	for i := range e.sources.known {
		if !inTable(e.ns, tcpip.AddrFrom4(e.sources.known[i])) {
			t.Errorf("%v is thought to be known, and is not", e.sources.known[i])
		}
	}
	if n := testing.AllocsPerRun(1000, func() { e.source(a); e.source(e.sources.known[3]) }); n != 0 {
		t.Errorf("%v objects are allocated for a known address", n)
	}
}
