package dns

import "encoding/binary"

// udpReply converts the resolver's answer, in place, into the asker's: with the asker's ID, its question letter by
// letter, and no more bytes than it accepts. truncated reports whether TC is set because of that.
func udpReply(resp, query []byte, q question) (out []byte, truncated bool) {
	flags := binary.BigEndian.Uint16(resp[2:])
	if q.isQuery() && binary.BigEndian.Uint16(resp[4:]) == 0 {
		return errorReply(query, q, flags&15), false
	}
	if q.isQuery() {
		copy(resp[headerLen:q.end], query[headerLen:q.end])
	}
	if len(resp) > q.size {
		resp, truncated = truncate(resp, q.size)
	}
	if truncated {
		flags |= flagTC
	}
	binary.BigEndian.PutUint16(resp, q.id)
	binary.BigEndian.PutUint16(resp[2:], flags)
	return resp, truncated
}

// truncate shortens an answer, in place, to size bytes, at least 512. It keeps the records that fit, whole and in
// order, and the OPT record. Many askers never retry by TCP (musl before 1.2.4) and take the answer for complete; an
// answer without records would mean that the name does not exist. more reports whether a record of the answer or
// authority section is missing, which TC must signal; the additional section is no promise (RFC 2181, section 9).
//
// Names are compressed by pointers to earlier bytes (RFC 1035, section 4.1.4), so the beginning of a message can be
// read without the rest.
func truncate(resp []byte, size int) (out []byte, more bool) {
	var opt []byte
	start, ok := walkRecords(resp, func(section int, typ uint16, record []byte) bool {
		if section == additional && typ == typeOPT && opt == nil && record[0] == 0 {
			opt = record
		}
		return true
	})
	if !ok { // unreadable: the asker may retry by TCP
		opt = nil
	}
	if len(opt) > size/4 { // options may have any length, and the asker needs records
		opt = opt[:optLen]
		opt[9], opt[10] = 0, 0
	}
	end, kept := start, [3]uint16{}
	if ok {
		walkRecords(resp, func(section int, typ uint16, record []byte) bool {
			if section == additional && (typ == typeOPT || typ == typeTSIG || typ == typeSIG) {
				return false // OPT is moved to the end; TSIG and SIG(0) sign the whole message
			}
			if end+len(record)+len(opt) > size {
				more = section < additional
				return false
			}
			end += len(record)
			kept[section]++
			return true
		})
	}
	if opt != nil {
		kept[additional]++
	}
	end += copy(resp[end:], opt)
	for i, n := range kept {
		binary.BigEndian.PutUint16(resp[6+2*i:], n)
	}
	return resp[:end], more || !ok
}

// The sections that contain records, in the order of their counts in the header.
const (
	answers = iota
	authority
	additional
)

// walkRecords calls each with every record of msg until it returns false. start is where the records begin, after the
// questions. ok means that msg contains all that it claims to, as far as it was read. It follows no pointers and
// allocates nothing.
func walkRecords(msg []byte, each func(section int, typ uint16, record []byte) bool) (start int, ok bool) {
	off := headerLen
	for n := binary.BigEndian.Uint16(msg[4:]); n > 0; n-- {
		end, ok := skipName(msg, off, true)
		if !ok || len(msg)-end < 4 {
			return off, false
		}
		off = end + 4
	}
	start = off
	for section := range 3 {
		for n := binary.BigEndian.Uint16(msg[6+2*section:]); n > 0; n-- {
			end, ok := skipName(msg, off, true)
			if !ok || len(msg)-end < 10 {
				return start, false
			}
			typ := binary.BigEndian.Uint16(msg[end:])
			end += 10 + int(binary.BigEndian.Uint16(msg[end+8:]))
			if end > len(msg) {
				return start, false
			}
			if !each(section, typ, msg[off:end]) {
				return start, true
			}
			off = end
		}
	}
	return start, true
}
