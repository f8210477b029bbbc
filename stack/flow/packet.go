package flow

import "net/netip"

// Packet is one UDP datagram. Its slices are lent for the call that hands it over: who needs them longer copies them.
type Packet struct {
	Src, Dst netip.AddrPort
	Payload  []byte
	// Head is the IP and UDP headers as received (and no payload), for ICMP quotes. Nil on packets toward the app.
	Head []byte
}

// PacketWriter writes datagrams to the app. It belongs to one goroutine; each loop has its own.
type PacketWriter interface {
	// WritePackets writes datagrams from any source to the app. Runs of one Src, Dst and size become one super-frame
	// where the kernel takes it. n is how many were written; those that can't be (too large, wrong family) are skipped
	// and counted. An error means that the device is gone.
	WritePackets([]Packet) (n int, err error)
	// Refuse answers a datagram of the app with an ICMP error that quotes p.Head.
	Refuse(p Packet, why Refusal)
}
