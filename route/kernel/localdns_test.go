package kernel

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dockerNAT are the rules with which Docker leads 127.0.0.11 to its own resolver.
const dockerNAT = `table ip docker {
	chain OUTPUT {
		type nat hook output priority -100
		ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:40053
	}
	chain POSTROUTING {
		type nat hook postrouting priority 100
		ip saddr 127.0.0.11 udp sport 40053 snat to 127.0.0.11:53
	}
}`

// Questions to 127.0.0.11 enter the TUN with its address, for the server of viasocks, and the answer comes from 127.0.0.11.
// Docker's resolver hears nothing, also at its own port. Without steering it is asked again. Without a server of viasocks it
// is refused.
func TestLocalDNS(t *testing.T) {
	inNamespace(t, func(t *testing.T) {
		_ = newWorld(t)
		nft(t, dockerNAT)
		docker, err := net.ListenPacket("udp", "127.0.0.11:40053")
		if err != nil {
			t.Fatal(err)
		}
		defer docker.Close()
		before := nft(t, "list", "ruleset")
		c := testConfig(t)
		c.LocalDNS, c.DNSServer = netip.MustParseAddr("127.0.0.11"), netip.MustParseAddr("198.18.0.2")
		h, tun := up(t, c)
		answerLocalDNS(t, tun, c.DNSServer)
		if udpFails("127.0.0.11:40053") == nil {
			t.Error("the own port of Docker's resolver is not refused")
		}
		down(t, h)
		tun.Close()
		if after := nft(t, "list", "ruleset"); after != before {
			t.Errorf("the rules were\n%s\nand are\n%s", before, after)
		}
		if n := heard(docker); n != 0 {
			t.Errorf("Docker's resolver has heard %d datagrams", n)
		}
		c.DNSServer = netip.Addr{}
		h, tun = up(t, c)
		if strings.Contains(nft(t, "list", "ruleset"), "dns_output") {
			t.Error("there is a chain for names without a server")
		}
		if udpFails("127.0.0.11:53") == nil {
			t.Error("without a server, port 53 is not refused")
		}
		down(t, h)
		tun.Close()
		if err := udpFails("127.0.0.11:53"); err != nil || heard(docker) == 0 {
			t.Errorf("without steering Docker's resolver is not asked: %v", err)
		}
	})
}

// udpFails sends two datagrams to dst and returns the error that a refusal leaves.
func udpFails(dst string) error {
	c, err := net.Dial("udp", dst)
	if err != nil {
		return err
	}
	defer c.Close()
	for range 2 {
		if _, err := c.Write([]byte("question")); err != nil {
			return err
		}
	}
	return nil
}

// heard returns how many datagrams have arrived.
func heard(c net.PacketConn) (n int) {
	for {
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, _, err := c.ReadFrom(make([]byte, 100)); err != nil {
			return n
		}
		n++
	}
}

// answerLocalDNS asks 127.0.0.11, checks that the question arrives at the TUN for server, and that its answer reaches the
// program.
func answerLocalDNS(t *testing.T, tun *os.File, server netip.Addr) {
	t.Helper()
	c, err := net.Dial("udp", "127.0.0.11:53")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("question")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 2000)
	var n int
	testkit.Eventually(t, "the question is in the TUN", func() bool {
		_ = tun.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, err = tun.Read(b)
		return err == nil && n > 28 && b[0] == 0x45 && b[9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(b[22:]) == 53
	})
	src, dst := netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
	if src.String() != "198.18.0.1" || dst != server || string(b[28:n]) != "question" {
		t.Fatalf("%q came from %v for %v", b[28:n], src, dst)
	}
	answer := append([]byte(nil), b[:n]...)
	copy(answer[12:], b[16:20])
	copy(answer[16:], b[12:16]) // the checksum of the header stays
	copy(answer[20:], b[22:24])
	copy(answer[22:], b[20:22])
	answer[26], answer[27] = 0, 0 // no checksum
	if _, err := tun.Write(answer); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(testkit.Patience))
	if n, err := c.Read(b); err != nil || string(b[:n]) != "question" {
		t.Errorf("the answer is %q: %v", b[:n], err)
	}
}
