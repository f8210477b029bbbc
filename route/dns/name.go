package dns

// appendHost appends the name at wire[off:] to b, in lower case and without the dot at the end. ok is false if it is
// not the name of a host: the root, or a label with a byte other than a letter, digit, hyphen or underscore. Such a
// name cannot be sent to a proxy as text. The name has been checked by skipName.
func appendHost(b, wire []byte, off int) (_ []byte, labels int, ok bool) {
	for wire[off] != 0 {
		n := int(wire[off])
		if labels > 0 {
			b = append(b, '.')
		}
		for _, c := range wire[off+1 : off+1+n] {
			c = lower(c)
			if !hostByte(c) {
				return b, labels, false
			}
			b = append(b, c)
		}
		off += 1 + n
		labels++
	}
	return b, labels, labels > 0
}

// appendAny is appendHost for a name of any bytes. It writes an exclamation mark for each byte that is a dot inside a
// label, a space, or not printable ASCII. plain is what appendHost calls ok.
func appendAny(b, wire []byte, off int) (_ []byte, labels int, plain bool) {
	plain = true
	for wire[off] != 0 {
		n := int(wire[off])
		if labels > 0 {
			b = append(b, '.')
		}
		for _, c := range wire[off+1 : off+1+n] {
			if c <= ' ' || c == '.' || c >= 0x7F {
				c = '!'
			}
			c = lower(c)
			plain = plain && hostByte(c)
			b = append(b, c)
		}
		off += 1 + n
		labels++
	}
	return b, labels, plain && labels > 0
}

func hostByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

// isHost reports whether name has the form that appendHost produces.
func isHost(name []byte) bool {
	if len(name) == 0 || len(name) > maxName-2 {
		return false
	}
	label := 0
	for _, c := range name {
		switch {
		case c == '.' && label == 0:
			return false
		case c == '.':
			label = 0
		case !hostByte(c) || label == 63:
			return false
		default:
			label++
		}
	}
	return label > 0
}

// isNumber reports whether name could be read as an address because its last label is a number. No top-level domain
// is a number (RFC 3696, section 2). A proxy that reads 127.1 or 0x7f000001 as an address would reach a host that no
// name leads to.
func isNumber(name []byte) bool {
	at := len(name)
	for at > 0 && name[at-1] != '.' {
		at--
	}
	label := name[at:]
	digits, hex := true, len(label) >= 2 && label[0] == '0' && label[1] == 'x'
	for i, c := range label {
		digits = digits && c >= '0' && c <= '9'
		hex = hex && (i < 2 || c >= '0' && c <= '9' || c >= 'a' && c <= 'f')
	}
	return digits || hex
}

// hasSuffix reports whether name is zone or below it.
func hasSuffix(name []byte, zone string) bool {
	n := len(name) - len(zone)
	return n >= 0 && string(name[n:]) == zone && (n == 0 || name[n-1] == '.')
}
