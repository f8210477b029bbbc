package e2e

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// question asks for the A record of a.example; answer answers it with 192.0.2.7.
func question(id uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	b = append(b, "\x01a\x07example\x00"...)
	return append(b, 0, 1, 0, 1)
}

func answer(q []byte) []byte {
	b := append([]byte(nil), q...)
	b[2], b[3], b[7] = 0x81, 0x80, 1
	return append(b, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 7)
}

// resolver is a name server that speaks TCP only and has an answer to question.
func resolver(t *testing.T, host string) netip.AddrPort {
	return nameServer(t, host, func(q []byte) []byte {
		// What a resolver adds behind the question (EDNS) is not echoed.
		a := answer(q[:len(question(0))])
		a[11] = 0
		return a
	})
}

// TestDNS: port 53 to any address, UDP and TCP, is answered by the resolver of --dns through the proxy.
func TestDNS(t *testing.T) { eachApart(t, testDNS) }

func testDNS(t *testing.T, offload string) {
	proxy := listenSOCKS(t)
	res := resolver(t, world4)
	a := startApp(t, "--proxy", proxy.URL(), "--offload", offload, "--dns", "tcp://"+res.String())
	check := func(t *testing.T, what string, id uint16, got []byte) {
		t.Helper()
		if want := answer(question(id)); string(got) != string(want) {
			t.Errorf("%s: got %x, want %x", what, got, want)
		}
	}
	for i, server := range []string{"198.18.0.2:53", "198.51.100.53:53", "[2001:db8:53::1]:53"} {
		dst := netip.MustParseAddrPort(server)
		u := a.udp(dst.Addr().Is6())
		id := uint16(100 + i)
		send(t, u, dst, string(question(id)))
		got, from := recv(t, u)
		check(t, "UDP "+server, id, []byte(got))
		if from != dst {
			t.Errorf("the answer of %v comes from %v", dst, from)
		}

		c := a.tcp(dst)
		c.SetDeadline(time.Now().Add(testkit.Patience))
		q := question(id)
		if _, err := c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)); err != nil {
			t.Fatal(err)
		}
		var n uint16
		if err := binary.Read(c, binary.BigEndian, &n); err != nil {
			t.Fatalf("TCP %s: %v", server, err)
		}
		b := make([]byte, n)
		if _, err := io.ReadFull(c, b); err != nil {
			t.Fatal(err)
		}
		check(t, "TCP "+server, id, b)
	}
	for _, r := range proxy.Requests() {
		if got := net.JoinHostPort(r.Dst.IP.String(), fmt.Sprint(r.Dst.Port)); got != res.String() {
			t.Errorf("the proxy was asked for %s: only the resolver was expected", got)
		}
	}
	// Garbage costs nothing and hurts nobody.
	u := a.udp(false)
	for _, junk := range []string{"", "x", string(make([]byte, 600)), string(answer(question(1)))} {
		send(t, u, netip.MustParseAddrPort("198.18.0.2:53"), junk)
	}
	send(t, u, netip.MustParseAddrPort("198.18.0.2:53"), string(question(7)))
	for {
		got, _ := recv(t, u)
		if len(got) > 1 && got[0] == 0 && got[1] == 7 {
			check(t, "after garbage", 7, []byte(got))
			return
		}
	}
}
