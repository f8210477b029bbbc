package dns

import "encoding/binary"

// Wire constants of RFC 1035, section 4.1.1, and RFC 6891.
const (
	headerLen   = 12
	maxMessage  = 65535
	minUDPSize  = 512 // RFC 1035, section 2.3.4: every asker accepts this
	maxUDPSize  = 65507
	typeSIG     = 24
	typeOPT     = 41
	typeTSIG    = 250
	typeIXFR    = 251
	typeAXFR    = 252
	maxRecords  = 64 // records in a question's message: OPT, TSIG and the like; more is garbage
	maxName     = 255
	optLen      = 11
	ednsSize    = 1232 // bytes that we accept by UDP, as we tell askers
	flagQR      = 0x8000
	flagTC      = 0x0200
	flagRD      = 0x0100
	flagCD      = 0x0010
	maskOpcode  = 0x7800
	opcodeDSO   = 6 << 11 // RFC 8490
	minRecord   = 11      // bytes of the shortest resource record: root, type, class, TTL, length
	rcodeFormat = 1
	rcodeServer = 2
	rcodeNotImp = 4
	rcodeRefuse = 5
)

// question is what we need to know about a question: where its name ends, and what answer the asker accepts.
type question struct {
	id    uint16
	flags uint16
	end   int    // end of the question section, which starts at headerLen; 0: there is none
	qtype uint16 // RFC 1035, section 3.2.3
	size  int    // bytes that the asker accepts by UDP: 512, or as in its OPT record
	edns  bool

	ednsVersion byte
	do          byte // the DO bit in its position (RFC 3225)

	trace *trace // nil: it is not logged
}

// isQuery reports whether q is a QUERY, as opposed to UPDATE, NOTIFY or another operation.
func (q *question) isQuery() bool { return q.flags&maskOpcode == 0 }

// disposition is the result of checking a message that may be a question.
type disposition uint8

const (
	accept  disposition = iota
	silence             // not a question at all: no answer, so that we cannot be used as a reflector
	answer              // answer with the rcode
)

// parseQuestion checks a message of the app. It never reads beyond the message and follows no pointers.
func parseQuestion(msg []byte) (q question, v disposition, rcode uint16) {
	if len(msg) < headerLen || len(msg) > maxMessage {
		return q, silence, 0
	}
	q.id = binary.BigEndian.Uint16(msg)
	q.flags = binary.BigEndian.Uint16(msg[2:])
	q.size = minUDPSize
	if q.flags&flagQR != 0 {
		return q, silence, 0
	}
	questions, most := binary.BigEndian.Uint16(msg[4:]), maxRecords
	if q.isQuery() {
		if questions != 1 {
			return q, answer, rcodeFormat
		}
	} else {
		if q.flags&maskOpcode == opcodeDSO {
			return q, answer, rcodeNotImp // it concerns a connection, and ours is shared
		}
		if questions > 1 {
			return q, answer, rcodeFormat
		}
		most = len(msg) / minRecord // an UPDATE may be long
	}
	off := headerLen
	if questions == 1 {
		end, ok := skipName(msg, headerLen, false)
		if !ok || len(msg)-end < 4 {
			return q, answer, rcodeFormat
		}
		q.qtype = binary.BigEndian.Uint16(msg[end:])
		q.end = end + 4
		off = q.end
	}
	if q.isQuery() && (q.qtype == typeAXFR || q.qtype == typeIXFR) {
		return q, answer, rcodeNotImp // many messages for one question: only TCP, which is carried unchanged, allows this
	}
	if !q.parseRecords(msg, off, most) {
		return q, answer, rcodeFormat
	}
	return q, accept, 0
}

// parseRecords checks the records of a message, which begin at off, and takes what its OPT record says. It returns false if they
// are malformed or more than most.
func (q *question) parseRecords(msg []byte, off, most int) bool {
	records := 0
	for off := 6; off < headerLen; off += 2 {
		records += int(binary.BigEndian.Uint16(msg[off:]))
	}
	if records > most {
		return false
	}
	for ok := true; records > 0; records-- {
		name := off
		if off, ok = skipName(msg, off, true); !ok || len(msg)-off < 10 {
			return false
		}
		data := int(binary.BigEndian.Uint16(msg[off+8:]))
		if binary.BigEndian.Uint16(msg[off:]) == typeOPT {
			if q.edns || msg[name] != 0 { // RFC 6891, section 6.1.1: only one, and of the root
				return false
			}
			q.edns, q.ednsVersion, q.do = true, msg[off+5], msg[off+6]&flagDO
			q.size = min(max(int(binary.BigEndian.Uint16(msg[off+2:])), minUDPSize), maxUDPSize)
		}
		if off += 10 + data; off > len(msg) {
			return false
		}
	}
	return true
}

// skipName returns the offset after the name at off. A compression pointer ends a name and is not followed.
func skipName(msg []byte, off int, pointer bool) (end int, ok bool) {
	for start := off; off < len(msg); {
		n := int(msg[off])
		switch {
		case n == 0:
			return off + 1, off+1-start <= maxName
		case n < 64:
			off += 1 + n
		case n >= 0xC0 && pointer:
			return off + 2, off+2 <= len(msg)
		default:
			return 0, false
		}
	}
	return 0, false
}

// errorReply returns an answer to msg without records. It repeats the question section if that could be parsed.
func errorReply(msg []byte, q question, rcode uint16) []byte {
	b := make([]byte, headerLen, headerLen+maxName+4+optLen)
	binary.BigEndian.PutUint16(b, q.id)
	binary.BigEndian.PutUint16(b[2:], flagQR|q.flags&(maskOpcode|flagRD|flagCD)|rcode)
	if q.end > 0 {
		binary.BigEndian.PutUint16(b[4:], 1)
		b = append(b, msg[headerLen:q.end]...)
	}
	if q.edns {
		b = appendOPT(b)
	}
	return b
}

// appendOPT ends a message with an OPT record that contains only our size (RFC 6891, section 6.1.2).
func appendOPT(b []byte) []byte {
	binary.BigEndian.PutUint16(b[10:], 1)
	return append(b, 0, 0, typeOPT, ednsSize>>8, ednsSize&0xFF, 0, 0, 0, 0, 0, 0)
}

// matches reports whether an answer of a resolver belongs to the question of query (RFC 5452, section 9.1), without
// comparing the ID. A resolver that did not understand the question may leave it out, and so may one that answers an
// operation other than QUERY (RFC 2136, section 3.8).
func matches(resp, query []byte, q question) bool {
	if len(resp) < headerLen {
		return false
	}
	flags := binary.BigEndian.Uint16(resp[2:])
	if flags&flagQR == 0 || flags&maskOpcode != q.flags&maskOpcode {
		return false
	}
	switch binary.BigEndian.Uint16(resp[4:]) {
	case 0:
		return flags&15 != 0 || !q.isQuery()
	case 1:
		if q.end == 0 {
			return false
		}
	default:
		return false
	}
	if len(resp) < q.end {
		return false
	}
	end, ok := skipName(resp, headerLen, false)
	if !ok || end+4 != q.end {
		return false
	}
	// Length bytes are below 64 and thus not letters, so folding the case of the whole name compares it correctly.
	for i := headerLen; i < q.end; i++ {
		a, b := resp[i], query[i]
		if i < end {
			a, b = lower(a), lower(b)
		}
		if a != b {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}
