package portmap

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// The result codes of NAT-PMP (RFC 6886, section 3.5).
const (
	pmpSuccess            = 0
	pmpNotAuthorized      = 2
	pmpNetworkFailure     = 3
	pmpOutOfResources     = 4
	pmpUnsupportedOpcode  = 5
	pmpAddress, pmpUDP    = 0, 1
	pmpTCP                = 2
	pmpMapLen, pmpReplyOf = 12, 0x80
)

var pmpResults = map[State]uint16{
	Works: pmpSuccess, Failed: pmpNetworkFailure, Unsupported: pmpOutOfResources,
	Forbidden: pmpNotAuthorized, Full: pmpOutOfResources,
}

// natpmp answers a request of NAT-PMP.
func (s *Server) natpmp(msg []byte, client netip.Addr, now time.Time) []byte {
	if !client.Is4() {
		s.count.Malformed++
		return nil
	}
	head := func(result uint16) []byte {
		b := []byte{0, msg[1] | pmpReplyOf}
		b = binary.BigEndian.AppendUint16(b, result)
		return binary.BigEndian.AppendUint32(b, s.epoch(now))
	}
	switch msg[1] {
	case pmpAddress:
		at, state := s.back.External()
		if state == Works && !at.Is4() {
			state = Failed
		}
		if state == Wait {
			return nil
		}
		var ip [4]byte
		if state == Works {
			ip = at.As4()
		}
		return append(head(pmpResults[state]), ip[:]...)
	case pmpUDP, pmpTCP:
		if len(msg) < pmpMapLen {
			s.count.Malformed++
			return nil
		}
		return s.natpmpMap(msg, client, now, head)
	}
	return head(pmpUnsupportedOpcode)
}

func (s *Server) natpmpMap(msg []byte, client netip.Addr, now time.Time, head func(uint16) []byte) []byte {
	k := key{UDP, client, binary.BigEndian.Uint16(msg[4:]), false}
	if msg[1] == pmpTCP {
		k.proto = TCP
	}
	suggested, life := binary.BigEndian.Uint16(msg[6:]), binary.BigEndian.Uint32(msg[8:])
	end := func(result, outer uint16, life uint32) []byte {
		b := binary.BigEndian.AppendUint16(head(result), k.port)
		b = binary.BigEndian.AppendUint16(b, outer)
		return binary.BigEndian.AppendUint32(b, life)
	}
	switch {
	case life == 0: // port 0: all of the protocol (section 3.4)
		for have := range s.ports {
			if !have.igd && have.proto == k.proto && have.client == client && (k.port == 0 || have.port == k.port) {
				s.drop(have)
			}
		}
		return end(pmpSuccess, 0, 0)
	case k.port == 0:
		s.count.Malformed++
		return end(pmpNotAuthorized, 0, 0)
	}
	m, state := s.request(k, suggested, min(life, uint32(keepMost/time.Second)), now)
	s.answered(state)
	switch state {
	case Wait:
		return nil
	case Works:
		return end(pmpSuccess, m.outer.Port(), lifetime(life))
	}
	return end(pmpResults[state], 0, 0)
}
