package portmap

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// The result codes of PCP (RFC 6887, section 7.4).
const (
	pcpSuccess           = 0
	pcpUnsuppVersion     = 1
	pcpNotAuthorized     = 2
	pcpMalformed         = 3
	pcpUnsuppOpcode      = 4
	pcpUnsuppOption      = 5
	pcpNetworkFailure    = 7
	pcpNoResources       = 8
	pcpUnsuppProtocol    = 9
	pcpExcessiveMappings = 10
	pcpCannotProvide     = 11
	pcpAddressMismatch   = 12
)

const (
	pcpVersion             = 2
	pcpAnnounce, pcpMap    = 0, 1
	pcpPreferFailure       = 2
	pcpHeadLen, pcpMapLen  = 24, 36
	pcpMaxLen              = 1100
	pcpErrorLife           = 30 // seconds for which an error holds
	pcpOptional, pcpOption = 128, 4
)

var pcpResults = map[State]byte{
	Works: pcpSuccess, Failed: pcpNetworkFailure, Unsupported: pcpUnsuppProtocol,
	Forbidden: pcpNotAuthorized, Full: pcpExcessiveMappings,
}

// pcp answers a request of PCP or of an unknown version.
func (s *Server) pcp(msg []byte, client netip.Addr, now time.Time) []byte {
	fail := func(result byte) []byte {
		if result == pcpMalformed || result == pcpUnsuppVersion {
			s.count.Malformed++
		} else {
			s.count.Refused++
		}
		b := make([]byte, min(max(len(msg), pcpHeadLen)&^3, pcpMaxLen))
		copy(b, msg)
		return s.pcpHead(b, msg[1], result, pcpErrorLife, now)
	}
	switch {
	case msg[0] != pcpVersion:
		return fail(pcpUnsuppVersion)
	case len(msg) < pcpHeadLen || len(msg)%4 != 0 || len(msg) > pcpMaxLen:
		return fail(pcpMalformed)
	case netip.AddrFrom16([16]byte(msg[8:24])).Unmap() != client.Unmap():
		return fail(pcpAddressMismatch)
	}
	switch msg[1] {
	case pcpAnnounce:
		return s.pcpHead(make([]byte, pcpHeadLen), msg[1], pcpSuccess, 0, now)
	case pcpMap:
	default:
		return fail(pcpUnsuppOpcode)
	}
	if len(msg) < pcpHeadLen+pcpMapLen {
		return fail(pcpMalformed)
	}
	strict, result := pcpOptions(msg[pcpHeadLen+pcpMapLen:])
	if result != pcpSuccess {
		return fail(result)
	}
	return s.pcpMap(msg, client, strict, now, fail)
}

// pcpHead writes the header of an answer into b.
func (s *Server) pcpHead(b []byte, opcode, result byte, life uint32, now time.Time) []byte {
	clear(b[:pcpHeadLen])
	b[0], b[1], b[3] = pcpVersion, opcode|0x80, result
	binary.BigEndian.PutUint32(b[4:], life)
	binary.BigEndian.PutUint32(b[8:], s.epoch(now))
	return b
}

// pcpOptions walks the options. strict: the program wants the port that it suggests, or none.
func pcpOptions(b []byte) (strict bool, result byte) {
	for len(b) > 0 {
		if len(b) < pcpOption {
			return false, pcpMalformed
		}
		n := int(binary.BigEndian.Uint16(b[2:]))
		padded := pcpOption + (n+3)&^3
		switch {
		case padded > len(b):
			return false, pcpMalformed
		case b[0] == pcpPreferFailure:
			if n != 0 || strict {
				return false, pcpMalformed
			}
			strict = true
		case b[0] < pcpOptional: // it must be understood
			return false, pcpUnsuppOption
		}
		b = b[padded:]
	}
	return strict, pcpSuccess
}

func (s *Server) pcpMap(msg []byte, client netip.Addr, strict bool, now time.Time, fail func(byte) []byte) []byte {
	body := msg[pcpHeadLen:]
	nonce := [12]byte(body[:12])
	k := key{Proto(body[12]), client, binary.BigEndian.Uint16(body[16:]), false}
	suggested, life := binary.BigEndian.Uint16(body[18:]), binary.BigEndian.Uint32(msg[4:])
	if have := s.ports[k]; have != nil && have.pcp && have.nonce != nonce {
		return fail(pcpNotAuthorized)
	}
	answer := func(outer netip.AddrPort, life uint32) []byte {
		b := append(make([]byte, pcpHeadLen), body[:pcpMapLen]...)
		binary.BigEndian.PutUint16(b[pcpHeadLen+18:], outer.Port())
		if outer.IsValid() {
			ip := outer.Addr().As16()
			copy(b[pcpHeadLen+20:], ip[:])
		}
		return s.pcpHead(b, pcpMap, pcpSuccess, life, now)
	}
	switch {
	case life == 0:
		if s.ports[k] != nil {
			s.drop(k)
		}
		return answer(netip.AddrPort{}, 0)
	case k.port == 0: // all ports, or all protocols
		return fail(pcpUnsuppProtocol)
	case k.proto != TCP && k.proto != UDP:
		return fail(pcpUnsuppProtocol)
	}
	m, state := s.request(k, suggested, lifetime(life), now) // not longer: a program that starts again has another nonce
	if state == Works && strict && m.outer.Port() != suggested {
		s.drop(k)
		return fail(pcpCannotProvide)
	}
	if state == Works && !m.outer.IsValid() { // the port is known, and the address cannot be
		s.drop(k)
		return fail(pcpNetworkFailure)
	}
	if state != Works && state != Wait {
		return fail(pcpResults[state])
	}
	s.answered(state)
	m.pcp, m.nonce = true, nonce
	if state == Wait {
		return nil
	}
	return answer(m.outer, lifetime(life))
}
