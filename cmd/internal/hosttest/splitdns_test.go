package hosttest

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

// answerNames answers every question that comes to an endpoint of a namespace with one address.
func (w *world) answerNames(ns, at string, a netip.Addr) {
	c := w.packets(ns, at)
	go func() {
		b := make([]byte, 512)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			end := 12
			for end < n && b[end] != 0 {
				end += 1 + int(b[end])
			}
			if end += 5; end > n {
				continue
			}
			r := append([]byte(nil), b[:end]...)
			r[2], r[3], r[7], r[11] = r[2]|0x80, 0x80, 1, 0
			a4 := a.As4()
			r = append(append(r, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4), a4[:]...)
			_, _ = c.WriteToUDPAddrPort(r, from)
		}
	}()
}

// lookUp asks an address of the world for a name, from the host.
func (w *world) lookUp(name string) (a netip.Addr, err error) {
	w.in("host", func() error {
		var c net.Conn
		if c, err = net.Dial("udp", "203.0.113.53:53"); err != nil {
			return nil
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		q := []byte{0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}
		for label := range strings.SplitSeq(name, ".") {
			q = append(append(q, byte(len(label))), label...)
		}
		if _, err = c.Write(append(q, 0, 0, 1, 0, 1)); err != nil {
			return nil
		}
		b := make([]byte, 512)
		var n int
		if n, err = c.Read(b); err == nil && n > 16 && b[7] == 1 {
			a, _ = netip.AddrFromSlice(b[n-4 : n])
		} else if err == nil {
			err = errors.New("no address came")
		}
		return nil
	})
	return a, err
}

// TestUpSplitDNS: the whole host is carried, and a zone's server and the host's own are asked past the proxy, by sockets that do
// not come back to viasocks. A name that no option is about has an address that stands for it.
func TestUpSplitDNS(t *testing.T) {
	if !apart(t) {
		return
	}
	w := newWorld(t)
	w.proxy(proxy4 + ":1080")
	w.answerNames("world", "203.0.113.9:53", addr("10.1.1.1"))
	w.answerNames("router", lanRouter4+":53", addr("10.2.2.2")) // it stands in resolv.conf
	d := w.up(
		"--proxy",
		proxyURL,
		"--dns",
		"fake",
		"--dns-for",
		"corp.example=direct:udp://203.0.113.9",
		"--dns-for",
		"lan=direct",
		"--rule",
		"name .direct.example direct",
	)
	for name, want := range map[string]string{
		"www.corp.example": "10.1.1.1/32", "printer.lan": "10.2.2.2/32", "www.direct.example": "10.2.2.2/32",
		"a.example": "198.18.0.0/15",
	} {
		if a, err := w.lookUp(name); err != nil || !netip.MustParsePrefix(want).Contains(a) {
			t.Errorf("%s has the address %v, %v", name, a, err)
		}
	}
	d.signal(syscall.SIGTERM)
	if err := d.wait(); err != nil {
		t.Error(err)
	}
}
