package flow

import "net/netip"

// Packet is one UDP datagram. Its slices may be used only during the call that passes it. A receiver that needs them
// longer must copy them.
type Packet struct {
	Src, Dst netip.AddrPort
	Payload  []byte
	// Head contains the IP and UDP headers as received, without payload, for quotes in ICMP errors. It is nil on
	// packets to the app.
	Head []byte
}

// PacketWriter writes datagrams to the app. It belongs to one goroutine; each loop has its own.
type PacketWriter interface {
	// WritePackets writes datagrams with any source address to the app. A run of equal Src, Dst and size becomes one
	// super-frame if the kernel supports it. n is the number of datagrams written; those that cannot be written (too
	// large, wrong family) are skipped and counted. An error means that the device is gone.
	WritePackets([]Packet) (n int, err error)
	// Refuse answers a datagram of the app with an ICMP error that quotes p.Head.
	Refuse(p Packet, why Refusal)
}
