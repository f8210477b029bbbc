package flow

import "net/netip"

// Echo is an ICMP or ICMPv6 echo request of the app. Packet is the whole IP packet; it is lent for the call that passes
// the Echo on. Whoever answers later keeps a copy of it.
type Echo struct {
	Src, Dst netip.Addr
	Packet   []byte
	By       EchoWriter
}

// EchoWriter answers echo requests. Its methods do not block and may be called from any goroutine. packet is that of an
// Echo.
type EchoWriter interface {
	// ReplyEcho sends an echo reply with the identifier, the sequence number and the data of the request.
	ReplyEcho(packet []byte)
	// RefuseEcho sends an ICMP error that quotes the request.
	RefuseEcho(packet []byte, why Refusal)
}
