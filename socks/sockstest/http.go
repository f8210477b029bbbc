package sockstest

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
)

// maxHead limits the head of a request.
const maxHead = 8192

// hearHTTP reads an HTTP CONNECT after its first byte, and checks the credentials. It returns false if the connection
// is over.
func (s *Server) hearHTTP(c stream, first byte, x *exchange) bool {
	head := []byte{first}
	for !bytes.HasSuffix(head, []byte("\r\n\r\n")) { // byte by byte, because what follows is for the target
		var b [1]byte
		if _, err := io.ReadFull(c, b[:]); err != nil || len(head) >= maxHead {
			return false
		}
		head = append(head, b[0])
	}
	r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
	if err != nil || r.Host != r.RequestURI {
		return s.answer(c, Fault{Raw: []byte("HTTP/1.1 400 Bad Request\r\n\r\n")}, nil)
	}
	if r.Method != http.MethodConnect {
		return s.answer(c, Fault{Raw: []byte("HTTP/1.1 405 Method Not Allowed\r\n\r\n")}, nil)
	}
	x.reply = replyHTTP
	x.Cmd = CmdConnect
	host, port, err := net.SplitHostPort(r.Host)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil {
		return s.answer(c, Fault{Raw: []byte("HTTP/1.1 400 Bad Request\r\n\r\n")}, nil)
	}
	x.Dst = Addr{Name: host, Port: uint16(n)}
	if ip, err := netip.ParseAddr(host); err == nil {
		x.Dst = Addr{IP: ip, Port: uint16(n)}
	}
	r.Header.Set("Authorization", r.Header.Get("Proxy-Authorization"))
	user, pass, _ := r.BasicAuth()
	x.User = user
	if s.auth && (user != s.user || pass != s.pass) {
		return s.answer(
			c,
			Fault{Raw: []byte("HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"test\"\r\n\r\n")},
			nil,
		)
	}
	return true
}

// replyHTTP returns the HTTP answer for a REP of SOCKS5.
func replyHTTP(code byte, _ Addr) []byte {
	status := map[byte]int{0: 200, 2: 403, 4: 504, 6: 504, 7: 501}[code]
	if status == 0 {
		status = 502
	}
	return fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nVia: 1.1 sockstest\r\n\r\n", status, http.StatusText(status))
}
