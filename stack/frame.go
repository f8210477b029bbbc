package stack

import (
	"net/netip"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// disposition tells what to do with a frame.
type disposition uint8

const (
	toGVisor disposition = iota
	dropMalformed
	dropICMP
	dropMulticast
	dropProto
	refuse // a SYN that gVisor would drop is answered at once
)

// IP protocol and IPv6 next header numbers of the IANA registry that icmp.go does not define.
const (
	protoHopByHop = 0
	protoRouting  = 43
	protoFragment = 44
	protoDestOpts = 60
)

// inspect decides what to do with a packet that the UDP path did not take. b is the frame and p the result of
// parseIP. Any bytes and any header are safe. hdr is the length of the IP and TCP headers if the packet is a TCP
// segment and not a fragment, otherwise 0.
//
// inspect checks only what gVisor would get wrong: gVisor answers echo requests for the whole Internet, treats
// super-frames of UDP as one datagram, and does not check the offload header.
func inspect(h *tun.Header, b []byte, p *packet) (d disposition, hdr int) {
	if !headerOK(h, len(b)) {
		return dropMalformed, 0
	}
	var src, dst netip.Addr
	if p.v6 {
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
	} else {
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
	}
	switch {
	case flow.OneHost(src) && unicast(dst):
	case p.v6 && (b[6] == protoICMPv6 || b[6] == protoHopByHop): // the kernel's own neighbour discovery
		return dropICMP, 0
	default:
		return dropMulticast, 0
	}
	if p.proto == protoICMPv6 && !p.v6 || p.proto == protoICMP && p.v6 {
		return dropProto, 0
	}
	return inspectTransport(h, b[:p.end], p.off, p.proto, p.frag)
}

// headerOK reports whether h can belong to a frame of n bytes.
func headerOK(h *tun.Header, n int) bool {
	if h.Flags&tun.NeedsCsum != 0 && int(h.CsumStart)+int(h.CsumOffset)+2 > n {
		return false
	}
	switch h.GSOType &^ tun.GSOECN {
	case tun.GSONone:
		return true
	case tun.GSOTCPv4, tun.GSOTCPv6, tun.GSOUDPL4:
		return h.GSOSize != 0 && int(h.HdrLen) <= n
	}
	return false
}

// inspectTransport checks the transport header, which begins at off.
func inspectTransport(h *tun.Header, b []byte, off int, proto byte, frag bool) (disposition, int) {
	gso := h.GSOType &^ tun.GSOECN
	switch proto {
	case protoTCP:
		if gso == tun.GSOUDPL4 {
			return dropMalformed, 0
		}
		if frag {
			return toGVisor, 0
		}
		if len(b) < off+20 {
			return dropMalformed, 0
		}
		hdr := off + int(b[off+12]>>4)*4
		if hdr < off+20 || hdr > len(b) {
			return dropMalformed, 0
		}
		if b[0]>>4 == 6 && netip.AddrFrom16([16]byte(b[24:40])).Is4In6() {
			if isSYN(b[off+13]) {
				return refuse, hdr
			}
			return dropProto, 0
		}
		return toGVisor, hdr
	case protoUDP:
		if gso != tun.GSONone {
			return dropMalformed, 0
		}
		return toGVisor, 0
	case protoICMP, protoICMPv6:
		// An ICMP error about a flow may lower its segment size. Everything else is dropped unless takeEcho takes it:
		// SOCKS cannot carry echo, and gVisor would answer it for addresses that may not exist.
		if frag || gso != tun.GSONone || len(b) < off+8 {
			return dropICMP, 0
		}
		t := b[off]
		if proto == protoICMP && t == 3 || proto == protoICMPv6 && (t == 1 || t == 2) {
			return toGVisor, 0
		}
		return dropICMP, 0
	}
	return dropProto, 0
}

// unicast reports whether a packet to a may be answered with an error (RFC 1122, section 3.2.2; RFC 4443, section 2.4
// (e)). flow.OneHost and flow.CanBePeer decide which addresses can carry a flow. Loopback addresses never arrive on a
// device (RFC 1122, section 3.2.1.3).
func unicast(a netip.Addr) bool {
	return !a.IsMulticast() && !a.IsUnspecified() && !a.IsLoopback() && a != broadcast
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})

// isSYN reports whether a TCP segment requests a new connection. flags is the header byte that contains the flags.
func isSYN(flags byte) bool {
	return header.TCPFlags(flags)&(header.TCPFlagSyn|header.TCPFlagAck) == header.TCPFlagSyn
}
