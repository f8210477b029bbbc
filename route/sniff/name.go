package sniff

import (
	"bufio"
	"bytes"
	"net"
	"net/http"
	"strings"

	"golang.org/x/crypto/cryptobyte"
)

// MaxBytes is the maximum that is read of a flow to find its name.
const MaxBytes = 16 << 10

// Name looks for a name in b, the first bytes that a program sends. need is 0 if more bytes would change nothing;
// otherwise it is the minimum length of b for another attempt. It exceeds MaxBytes if the message claims to be that
// long. The name is as the program wrote it, and may be anything. No memory is allocated according to a length that
// the bytes claim.
func Name(b []byte) (name string, need int) {
	switch {
	case len(b) == 0:
		return "", 1
	case b[0] == recordHandshake:
		return tlsName(b)
	case b[0] >= 'A' && b[0] <= 'Z':
		return httpName(b)
	}
	return "", 0
}

// Constants of TLS (RFC 8446, sections 4 and 5.1; RFC 6066, section 3).
const (
	recordHandshake = 22
	recordHead      = 5
	maxRecord       = 1 << 14
	maxRecords      = 64 // of one ClientHello: each is examined again with the next
	clientHello     = 1
	handshakeHead   = 4
	extServerName   = 0
	nameTypeHost    = 0
)

// tlsName returns the server name of a ClientHello, which may span several records.
func tlsName(b []byte) (name string, need int) {
	hello, parts := []byte(nil), 0
	for at := 0; ; {
		if len(b) < at+recordHead {
			return "", at + recordHead
		}
		n := int(b[at+3])<<8 | int(b[at+4])
		if b[at] != recordHandshake || b[at+1] != 3 || n == 0 || n > maxRecord {
			return "", 0
		}
		end := at + recordHead + n
		part := b[at+recordHead : min(end, len(b))]
		if parts++; parts > maxRecords {
			return "", 0
		} else if parts == 1 {
			hello = part[:len(part):len(part)] // no copy if one record has everything
		} else {
			hello = append(hello, part...)
		}
		if len(hello) > 0 && hello[0] != clientHello {
			return "", 0
		}
		size := handshakeHead
		if len(hello) >= handshakeHead {
			size += int(hello[1])<<16 | int(hello[2])<<8 | int(hello[3])
			if len(hello) >= size {
				return serverName(hello[handshakeHead:size]), 0
			}
			if size > MaxBytes {
				return "", MaxBytes + 1
			}
		}
		if end > len(b) {
			return "", min(end, len(b)+size-len(hello))
		}
		at = end
	}
}

// serverName returns the host name in the server name extension of a ClientHello, or an empty string.
func serverName(hello []byte) string {
	s := cryptobyte.String(hello)
	var session, suites, compressions, extensions cryptobyte.String
	if !s.Skip(2+32) || !s.ReadUint8LengthPrefixed(&session) || !s.ReadUint16LengthPrefixed(&suites) ||
		!s.ReadUint8LengthPrefixed(&compressions) || !s.ReadUint16LengthPrefixed(&extensions) {
		return ""
	}
	for !extensions.Empty() {
		var kind uint16
		var data, list cryptobyte.String
		if !extensions.ReadUint16(&kind) || !extensions.ReadUint16LengthPrefixed(&data) {
			return ""
		}
		if kind != extServerName {
			continue
		}
		if !data.ReadUint16LengthPrefixed(&list) {
			return ""
		}
		for !list.Empty() {
			var kind uint8
			var host cryptobyte.String
			if !list.ReadUint8(&kind) || !list.ReadUint16LengthPrefixed(&host) {
				return ""
			}
			if kind == nameTypeHost {
				return string(host)
			}
		}
		return ""
	}
	return ""
}

// maxMethod is longer than any method of HTTP.
const maxMethod = 24

// httpName returns the Host field of a request to an origin server. A request to a proxy (an absolute URL, or
// CONNECT) names another host than the one that the flow goes to, and therefore gives no name.
func httpName(b []byte) (name string, need int) {
	method, _, whole := bytes.Cut(b[:min(len(b), maxMethod)], []byte(" "))
	for _, c := range method {
		if (c < 'A' || c > 'Z') && c != '-' && c != '_' {
			return "", 0 // "SSH-2.0", for instance
		}
	}
	if !whole {
		if len(b) >= maxMethod {
			return "", 0
		}
		return "", len(b) + 1
	}
	if line, _, whole := bytes.Cut(b, []byte("\n")); whole && !bytes.Contains(line, []byte(" HTTP/1.")) {
		return "", 0
	}
	end := bytes.Index(b, []byte("\n\r\n"))
	if lf := bytes.Index(b, []byte("\n\n")); end < 0 || lf >= 0 && lf < end {
		end = lf
	}
	if end < 0 {
		return "", len(b) + 1
	}
	req, err := http.ReadRequest(bufio.NewReaderSize(bytes.NewReader(b), 1<<10))
	if err != nil || req.Method == http.MethodConnect || req.URL.IsAbs() {
		return "", 0
	}
	host := req.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if strings.ContainsAny(host, ":[]") { // an IPv6 address
		return "", 0
	}
	return host, 0
}
