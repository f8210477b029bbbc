package daemon

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/viasocks/viasocks/cmd/internal/config"
	"github.com/viasocks/viasocks/socks/sockstest"
	"github.com/viasocks/viasocks/stack/stacktest"
	"github.com/viasocks/viasocks/stack/testkit"
)

// samples has a value for each option of `up`, other than its default. An option that needs none has "".
var samples = map[string]string{
	"proxy": "PROXY", "password-file": "FILE", "upstream": "b=socks5://192.0.2.3", "rule": "port 25 reject",
	"dns":     "tcp://192.0.2.53",
	"dns-for": "corp.example=tcp://192.0.2.54", "dns-exclude": ".real.example", "dns-single-labels": "off",
	"dns-pool": "198.19.0.0/16", "dns-pool6": "fd77::/48", "dns-pool-file": "FILE", "ipv6": "off",
	"proxy-ca": "CA", "dns-ca": "CA", "allow": "tcp:203.0.113.9:80\nallow udp:203.0.113.9:6881\nallow tcp:a.example:443",
	"decisions":       "FILE",
	"connect-timeout": "3s", "handshake-timeout": "20s", "idle-timeout": "1h", "udp-timeout": "1m", "max-pending": "512",
	"sniff": "name", "sniff-port": "80,8443", "sniff-wait": "50ms", "ping": "443",
	"max-pending-per-destination": "32", "max-mappings": "64", "pool": "4", "pool-idle": "9s", "pool-age": "8s",
	"pipeline": "auto", "fast-open": "", "mtu": "1400", "offload": "off", "udp-gso": "off",
	"lan": "refuse", "inbound": "carry", "inbound-port": "51820,27015-27020", "exclude": "192.0.2.128/25", "exclude-uid": "1000",
	"exclude-port": "123", "exclude-device": "eth9",
	"exclude-cgroup": "a.slice", "include": "203.0.113.0/24", "include-uid": "1000-1999", "include-port": "80",
	"include-device": "eth8",
	"include-cgroup": "b.slice", "strict": "", "fail-open": "", "stay-closed": "", "confirm": "1m", "wait": "",
	"takeover": "", "takeover-limit": "5m", "dry-run": "",
	"control-group": "0", "members-exclude": "", "direct": "carry",
	"exclude-unit": "chrony.service", "exclude-exe": "/usr/bin/true", "resolved": "off",
	"tun": "other0", "mark": "0x100/0xff00", "nft-table": "other", "priority": "8000", "table": "77", "log-level": "warn",
	"log-file": "FILE", "listen": "6881\nlisten auto", "forwarded-port": "203.0.113.9:6882/udp",
	"on-port": "/bin/true", "stun": "203.0.113.9:3478", "ftp-active": "21", "state-dir": "/run/other",
	"metrics": "unix:/run/other/metrics.sock",
}

// carried is a plane with an app on one side and a proxy on the other, and what the app must be able to do through it.
type carried struct {
	t     *testing.T
	u     *up
	app   *stacktest.App
	proxy *sockstest.Server
}

var (
	farTCP = netip.MustParseAddrPort("203.0.113.9:80")
	farUDP = netip.MustParseAddrPort("203.0.113.9:6881")
)

// newCarried starts with a configuration file that is empty: the proxy stands in the environment.
func newCarried(t *testing.T) (c *carried, write func(string)) {
	s, err := sockstest.Listen("tcp4", "127.0.0.1:0", sockstest.WithRedirectsOnly())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	s.Redirect(farTCP, serveTCP(t, func(b []byte) []byte { return b }))
	s.Redirect(farUDP, echoUDP(t))
	dns := serveTCP(t, func(q []byte) []byte {
		q[4] |= 0x80 // an answer, behind the two bytes of its length
		return q
	})
	for _, a := range []string{"1.1.1.1:53", "9.9.9.9:53", "192.0.2.53:53"} {
		s.Redirect(netip.MustParseAddrPort(a), dns)
	}
	u, write, theirs, _ := startUp(t, "", []string{"ALL_PROXY=socks5://al@" + s.Addr().String()})
	app, err := stacktest.New(theirs, netip.MustParseAddr("198.18.0.1"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { app.Close() })
	return &carried{t, u, app, s}, write
}

// serveTCP answers each read of each connection.
func serveTCP(t *testing.T, answer func([]byte) []byte) netip.AddrPort {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b := make([]byte, 512)
				for n, err := c.Read(b); err == nil; n, err = c.Read(b) {
					c.Write(answer(b[:n]))
				}
			}()
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echoUDP(t *testing.T) netip.AddrPort {
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { u.Close() })
	go func() {
		b := make([]byte, 512)
		for n, from, err := u.ReadFrom(b); err == nil; n, from, err = u.ReadFrom(b) {
			u.WriteTo(b[:n], from)
		}
	}()
	return u.LocalAddr().(*net.UDPAddr).AddrPort()
}

// works fails the test unless TCP, UDP from a new socket, and names are carried.
func (c *carried) works(when string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	conn, err := c.app.DialTCP(ctx, farTCP)
	if err != nil {
		c.t.Fatalf("%s: TCP: %v", when, err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(testkit.Patience))
	b := make([]byte, 512)
	if _, err := conn.Write([]byte("tcp")); err != nil {
		c.t.Fatalf("%s: TCP: %v", when, err)
	}
	if _, err := io.ReadFull(conn, b[:3]); err != nil || string(b[:3]) != "tcp" {
		c.t.Fatalf("%s: TCP: %q, %v", when, b[:3], err)
	}
	c.exchange(when+": UDP", farUDP, []byte("udp"), func(b []byte) bool { return string(b) == "udp" })
	for typ, want := range map[string]int{"\x00\x01": 16, "\x00\x10": 0} { // A, and TXT, which the resolver answers in any mode
		question := append([]byte{0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0}, "\x01a\x07example\x00"+typ+"\x00\x01"...)
		if !c.u.config().Fake.On {
			want = 0
		}
		c.exchange(when+": names", netip.MustParseAddrPort("198.18.0.2:53"), question, func(b []byte) bool {
			return len(b) == len(question)+want && binary.BigEndian.Uint16(b) == 0xabcd && b[2]&0x80 != 0 && b[3]&0xf == 0
		})
	}
}

// exchange sends a datagram from a socket of its own until it is answered.
func (c *carried) exchange(what string, to netip.AddrPort, b []byte, right func([]byte) bool) {
	c.t.Helper()
	u, err := c.app.DialUDP(netip.AddrPort{}, to)
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
	defer u.Close()
	got := make([]byte, 512)
	for end := time.Now().Add(testkit.Patience / 4); time.Now().Before(end); {
		if _, err := u.Write(b); err != nil {
			c.t.Fatalf("%s: %v", what, err)
		}
		u.SetReadDeadline(time.Now().Add(time.Second)) // a datagram may be lost while the association is made
		n, err := u.Read(got)
		if err != nil {
			continue
		}
		if !right(got[:n]) {
			c.t.Fatalf("%s: the answer is %q", what, got[:n])
		}
		return
	}
	c.t.Fatalf("%s: no answer", what)
}

// refuses fails the test if a connection that --allow does not name reaches the proxy.
func (c *carried) refuses() {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	defer cancel()
	other := netip.AddrPortFrom(farTCP.Addr(), 81)
	if conn, err := c.app.DialTCP(ctx, other); err == nil {
		conn.Close()
		c.t.Errorf("allow: a connection to %v was made", other)
	}
	for _, r := range c.proxy.Requests() {
		if r.Dst.Port == other.Port() {
			c.t.Errorf("allow: the proxy was asked for %v", r.Dst)
		}
	}
}

// reload has the file read again, which must be taken.
func (c *carried) reload(when string) {
	c.t.Helper()
	c.u.mu.Lock()
	c.u.reloaded = nil
	c.u.mu.Unlock()
	c.u.reload()
	if c.u.status().Reloaded == nil {
		c.t.Fatalf("%s: the file was not taken", when)
	}
}

// A reload of a file that did not change changes nothing; of one with any single option, and of that without it again, no
// more than it says. What the file does not name has the same default whether it was so from the start or from a reload on.
func TestReloadOfEachOption(t *testing.T) {
	testkit.CheckLeaks(t)
	c, write := newCarried(t)
	c.works("at the start")
	c.reload("the empty file")
	c.works("the empty file read again")
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("geheim\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if _, pem, err := sockstest.Certificate("127.0.0.1"); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(ca, pem, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range config.Options {
		sample, ok := samples[o.Name]
		if o.Cmds&config.Up == 0 || o.Name == "config" {
			continue
		}
		if !ok {
			t.Errorf("there is no sample for --%s", o.Name)
			continue
		}
		switch sample {
		case "PROXY":
			sample = c.proxy.URL()
		case "FILE":
			sample = secret
		case "CA":
			sample = ca
		}
		write(o.Name + " " + sample + "\n")
		c.reload(o.Name)
		c.works("with " + o.Name)
		if o.Name == "allow" {
			c.refuses()
		}
		named := strings.Contains(strings.Join(c.u.status().Warnings, "\n"), "at the next start only: "+o.Name)
		if named == o.Live {
			t.Errorf("%s: live is %v, and the status says %q", o.Name, o.Live, c.u.status().Warnings)
		}
		write("# nothing\n")
		c.reload(o.Name + " removed")
		c.works(o.Name + " removed")
		if w := c.u.status().Warnings; len(w) > 0 {
			t.Errorf("%s removed again: %q", o.Name, w)
		}
	}
}

// A proxy inside TLS is trusted by --proxy-ca from a reload on, and not by the certificates of another file.
func TestReloadOfTheAuthority(t *testing.T) {
	testkit.CheckLeaks(t)
	cert, right, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	_, wrong, err := sockstest.Certificate("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	s := listen(t, sockstest.WithTLS(&tls.Config{Certificates: []tls.Certificate{cert}}))
	s.Redirect(farTCP, serveTCP(t, func(b []byte) []byte { return b }))
	c, write := newCarried(t)
	for i, pem := range [][]byte{wrong, right, wrong} {
		ca := filepath.Join(t.TempDir(), "ca.pem")
		if err := os.WriteFile(ca, pem, 0o600); err != nil {
			t.Fatal(err)
		}
		write("proxy socks5+tls://" + s.Addr().String() + "\nproxy-ca " + ca + "\n")
		c.reload("proxy-ca")
		ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
		conn, err := c.app.DialTCP(ctx, farTCP)
		cancel()
		if trusted := i == 1; (err == nil) != trusted {
			t.Errorf("reload %d: trusted is to be %v: %v", i, trusted, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

// The configuration that the manual shows is read, reloaded and carries.
func TestReloadOfTheManualsExample(t *testing.T) {
	testkit.CheckLeaks(t)
	manual, err := os.ReadFile("../../viasocks/viasocks.conf.5")
	if err != nil {
		t.Fatal(err)
	}
	examples := strings.Split(string(manual), ".Bd -literal -offset indent\nproxy ")
	if len(examples) < 2 {
		t.Fatal("the manual shows no configuration file")
	}
	c, write := newCarried(t)
	for _, e := range examples[1:] {
		e, _, _ = strings.Cut(e, ".Ed")
		e = "proxy " + regexp.MustCompile(`socks5://10\.0\.0\.\d`).ReplaceAllString(e, c.proxy.URL())
		write(e)
		for range 2 {
			c.reload("the manual's example")
			c.works("the manual's example")
		}
		write("")
		c.reload("the empty file")
		c.works("the empty file after it")
	}
}
