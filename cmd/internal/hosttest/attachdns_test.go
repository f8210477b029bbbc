package hosttest

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// dockerDNSRules are those that Docker has in a container. Its resolver listens on ports that it chooses.
const dockerDNSRules = `
table ip nat {
	chain OUTPUT {
		type nat hook output priority -100; policy accept;
		ip daddr 127.0.0.11 jump DOCKER_OUTPUT
	}
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		ip daddr 127.0.0.11 jump DOCKER_POSTROUTING
	}
	chain DOCKER_OUTPUT {
		ip daddr 127.0.0.11 tcp dport 53 dnat to 127.0.0.11:40053
		ip daddr 127.0.0.11 udp dport 53 dnat to 127.0.0.11:40053
	}
	chain DOCKER_POSTROUTING {
		ip saddr 127.0.0.11 tcp sport 40053 snat to 127.0.0.11:53
		ip saddr 127.0.0.11 udp sport 40053 snat to 127.0.0.11:53
	}
}
`

// connected opens a UDP socket in a namespace that is connected to addr.
func (w *world) connected(ns, addr string) (c net.Conn) {
	w.t.Helper()
	w.in(ns, func() (err error) {
		c, err = net.Dial("udp", addr)
		return err
	})
	w.t.Cleanup(func() { c.Close() })
	return c
}

// TestAttachDockerDNS: names that a container asks of Docker's resolver are answered by viasocks, and the resolver, which
// would ask the world from the host, hears none of them; in the end it is asked again.
func TestAttachDockerDNS(t *testing.T) {
	if !apart(t) {
		return
	}
	testkit.CheckLeaks(t)
	w, rec, _ := container(t)
	w.nft("ctr", dockerDNSRules)
	var asked atomic.Int64
	docker := w.packets("ctr", "127.0.0.11:40053")
	go func() { // it answers whatever it is asked with the question
		b := make([]byte, 1500)
		for {
			n, from, err := docker.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			asked.Add(1)
			b[2] |= 0x80
			_, _ = docker.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	before := w.stateOf("ctr")
	// A socket that has asked before keeps its translation.
	old := w.connected("ctr", "127.0.0.11:53")
	if _, err := old.Write(question("old.example")); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "control: Docker's resolver is asked", func() bool { return asked.Load() == 1 })
	if _, err := w.nameInside("127.0.0.11:53", "before.example"); err != nil || asked.Load() != 2 {
		t.Fatalf("control: Docker's resolver was asked %d times, not twice: %v", asked.Load(), err)
	}

	d := w.attach("--netns", "ctr")
	d.ready()
	rec.take()
	addrs, err := w.nameInside("127.0.0.11:53", "name.example")
	if err != nil || len(addrs) != 1 || !strings.HasPrefix(addrs[0], "198.18.") {
		t.Fatalf("a name: %v, %v", addrs, err)
	}
	_, _ = old.Write(question("old.example"))
	own := w.connected("ctr", "127.0.0.11:40053")
	_, _ = own.Write(question("own.example"))
	w.in("ctr", func() error { // over TCP
		c, err := net.Dial("tcp", "127.0.0.11:53")
		if err != nil {
			return err
		}
		defer c.Close()
		q := question("tcp.example")
		if _, err := c.Write(append([]byte{0, byte(len(q))}, q...)); err != nil {
			return err
		}
		n, err := c.Read(make([]byte, 1500))
		if err != nil || n < len(q) {
			t.Errorf("over TCP: %d bytes, %v", n, err)
		}
		return nil
	})
	if n := asked.Load(); n != 2 {
		t.Errorf("Docker's resolver was asked %d times more", n-2)
	}
	for _, s := range rec.take() {
		t.Errorf("this left the host: %+v", s)
	}
	if err := d.stop(); err != nil {
		t.Errorf("it ended with %v\n%s", err, d.log)
	}
	w.restored("detached", "ctr", before)
	if _, err := w.nameInside("127.0.0.11:53", "after.example"); err != nil || asked.Load() != 3 {
		t.Errorf("detached, Docker's resolver was asked %d times, not 3: %v", asked.Load(), err)
	}
}
