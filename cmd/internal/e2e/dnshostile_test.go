package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// gateway53 is the name server that the program finds in its resolv.conf.
var gateway53 = netip.MustParseAddrPort("198.18.0.2:53")

// ask is a question for the A records of a name in presentation form, whose letters are kept.
func ask(id uint16, name string) []byte {
	b := binary.BigEndian.AppendUint16(nil, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	for label := range strings.SplitSeq(name, ".") {
		b = append(append(b, byte(len(label))), label...)
	}
	return append(b, 0, 0, 1, 0, 1)
}

// silent stands for no answer in the place of an RCODE.
const silent = -1

// hostile are messages that nobody should send, and what they are answered with: RCODEs of RFC 1035 4.1.1.
func hostile() map[string]struct {
	msg   []byte
	rcode int
} {
	const noError, formErr, servFail, notImp = 0, 1, 2, 4
	set := func(at int, v uint16) []byte {
		b := ask(7, "www.example.com")
		binary.BigEndian.PutUint16(b[at:], v)
		return b
	}
	head := func(counts ...uint16) []byte {
		b := []byte{0, 7, 1, 0}
		for _, n := range counts {
			b = binary.BigEndian.AppendUint16(b, n)
		}
		return b
	}
	a63 := strings.Repeat("a", 63)
	noise := make([]byte, 1200)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	noise[2] |= 0x80 // it says that it is an answer
	type row = struct {
		msg   []byte
		rcode int
	}
	end := len(ask(7, "www.example.com"))
	return map[string]row{
		"nothing":                    {nil, silent},
		"one byte":                   {[]byte{0}, silent},
		"half a header":              {ask(7, "a")[:11], silent},
		"noise":                      {noise, silent},
		"an answer":                  {set(2, 0x8180), silent},
		"no question":                {set(4, 0), formErr},
		"only a header":              {head(1, 0, 0, 0), formErr},
		"65535 questions":            {set(4, 65535), formErr},
		"65535 of everything":        {append(head(65535, 65535, 65535, 65535), make([]byte, 1000)...), formErr},
		"65535 records":              {set(10, 65535), formErr},
		"a pointer to itself":        {append(head(1, 0, 0, 0), 0xC0, 12, 0, 1, 0, 1), formErr},
		"two pointers":               {append(head(1, 0, 0, 0), 0xC0, 14, 0xC0, 12, 0, 1, 0, 1), formErr},
		"a pointer in a record":      {append(set(10, 1), 0xC0, byte(end), 0, 1, 0, 1, 0, 0, 0, 0, 0, 0), noError},
		"a label type of 1990":       {append(head(1, 0, 0, 0), 0x41, 'a', 0, 0, 1, 0, 1), formErr},
		"a name without an end":      {append(head(1, 0, 0, 0), bytes.Repeat([]byte{1, 'a'}, 600)...), formErr},
		"a name of 255 bytes":        {ask(7, a63+"."+a63+"."+a63+"."+a63[:61]), noError},
		"a name of 256 bytes":        {ask(7, a63+"."+a63+"."+a63+"."+a63[:62]), formErr},
		"an unknown class":           {set(end-2, 0xFFF0), servFail},
		"CHAOS":                      {set(end-2, 3), servFail},
		"an unknown type":            {set(end-4, 0xFFF0), servFail},
		"a zone transfer":            {set(end-4, 252), notImp},
		"STATUS":                     {set(2, 2<<11), servFail},
		"DSO":                        {set(2, 6<<11), notImp},
		"opcode 15":                  {set(2, 15<<11), servFail},
		"64 KiB of zeros":            {append(head(0, 0, 0, 0), make([]byte, 65000)...), formErr},
		"64 KiB behind a question":   {append(ask(7, "www.example.com"), make([]byte, 60000)...), noError},
		"64 KiB of pointers":         {append(head(1, 0, 0, 5000), bytes.Repeat([]byte{0xC0, 12}, 30000)...), formErr},
		"64 KiB of compressed names": {append(set(6, 60), bytes.Repeat([]byte{0xC0, 12}, 30000)...), formErr},
	}
}

// rcodeOf is the RCODE of an answer to id.
func rcodeOf(t *testing.T, b []byte, id uint16) int {
	t.Helper()
	if len(b) < 12 || binary.BigEndian.Uint16(b) != id || b[2]&0x80 == 0 {
		t.Fatalf("not an answer to %d: %x", id, b)
	}
	return int(b[3] & 15)
}

// TestHostileDNS: whatever comes to port 53 has the right answer or none, by UDP and by TCP, and the next question is answered.
func TestHostileDNS(t *testing.T) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--dns", noResolver, "--dns-pool", "198.19.0.0/16")
	u := a.udp(false)
	got := make([]byte, 65536)
	read := func() []byte {
		t.Helper()
		u.SetReadDeadline(time.Now().Add(testkit.Patience))
		n, err := u.Read(got)
		if err != nil {
			t.Fatal(err)
		}
		return got[:n]
	}
	for what, row := range hostile() {
		t.Run(strings.ReplaceAll(what, " ", "_"), func(t *testing.T) {
			if _, err := u.WriteToUDPAddrPort(row.msg, gateway53); err != nil {
				t.Fatal(err)
			}
			if row.rcode != silent {
				if rcode := rcodeOf(t, read(), 7); rcode != row.rcode {
					t.Errorf("UDP: RCODE %d, want %d", rcode, row.rcode)
				}
			}
			u.WriteToUDPAddrPort(ask(8, "after.example"), gateway53)
			if rcode := rcodeOf(t, read(), 8); rcode != 0 {
				t.Errorf("UDP: RCODE %d for the question behind it", rcode)
			}
			testHostileTCP(t, a, what, row.msg, row.rcode)
		})
	}
	// The letters of the question come back as they were sent (0x20).
	q := ask(9, "wWw.ExAmPlE.cOm")
	u.WriteToUDPAddrPort(q, gateway53)
	if b := read(); rcodeOf(t, b, 9) != 0 || !bytes.Equal(b[12:len(q)], q[12:]) {
		t.Errorf("the question came back as %q", b[12:])
	}
}

// testHostileTCP sends a message behind its length, and looks for the answer or for the end of the connection.
func testHostileTCP(t *testing.T, a *app, what string, msg []byte, rcode int) {
	t.Helper()
	c := a.tcp(gateway53)
	defer c.Close()
	c.SetDeadline(time.Now().Add(testkit.Patience))
	c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...))
	var size [2]byte
	_, err := io.ReadFull(c, size[:])
	if rcode == silent {
		if err == nil {
			t.Error("TCP: there is an answer")
		}
		return // the connection is over
	}
	if err != nil {
		t.Fatalf("TCP: %v", err)
	}
	b := make([]byte, binary.BigEndian.Uint16(size[:]))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatalf("TCP: %v", err)
	}
	if got := rcodeOf(t, b, 7); got != rcode {
		t.Errorf("TCP: RCODE %d, want %d", got, rcode)
	}
}

// askMany asks for rate distinct names a second until stop is closed, and counts what was asked and answered. At most window
// questions wait for their answers: a machine that stalls would otherwise overflow the queues of the kernel with what was due
// meanwhile. Those that are not answered within a second are lost.
func askMany(u *net.UDPConn, rate int, stop chan struct{}) (asked, answered *atomic.Int64, wait func()) {
	asked, answered = new(atomic.Int64), new(atomic.Int64)
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			if _, err := u.Read(b); err != nil {
				return
			}
			answered.Add(1)
		}
	})
	wg.Go(func() {
		const step, window = 5 * time.Millisecond, 200
		tick := time.NewTicker(step)
		defer tick.Stop()
		var lost, seen int64
		moved := time.Now()
		for start := time.Now(); ; {
			select {
			case <-stop:
				testkit.Until(time.Second, func() bool { return answered.Load() >= asked.Load()-lost })
				u.SetReadDeadline(time.Now())
				return
			case <-tick.C:
			}
			if n := answered.Load(); n != seen {
				seen, moved = n, time.Now()
			} else if time.Since(moved) > time.Second {
				lost = asked.Load() - n
			}
			due := int64(time.Since(start).Seconds() * float64(rate))
			for asked.Load() < due && asked.Load()-lost-answered.Load() < window {
				n := asked.Add(1)
				u.WriteToUDPAddrPort(ask(uint16(n), fmt.Sprintf("n%d.flood.example", n)), gateway53)
			}
		}
	})
	return asked, answered, wg.Wait
}

// beside is what other flows see: a flow of a known rate, and datagrams that are echoed.
type beside struct {
	t        *testing.T
	apps     []*net.UDPConn
	echo     netip.AddrPort
	app, far *net.TCPConn
}

func newBeside(t *testing.T, a *app) *beside {
	t.Helper()
	echo, dst := farUDP(t, world4)
	go func() {
		b := make([]byte, 2000)
		for {
			n, from, err := echo.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			echo.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	o := &beside{t: t, echo: dst, apps: []*net.UDPConn{a.udp(false), a.udp(false), a.udp(false)}}
	o.app, o.far = pair(t, a, world4)
	pingers(t, o.apps, dst, testkit.Patience, 200*time.Millisecond) // the associations are there
	return o
}

// paced lets data for d flow at 16 MB/s, which leaves the machine room for the questions, and returns how long it took.
func (o *beside) paced(d time.Duration) (took time.Duration) {
	const piece, step = 160 << 10, 10 * time.Millisecond
	var wg sync.WaitGroup
	defer wg.Wait()
	start := time.Now()
	want := int64(d/step) * piece
	wg.Go(func() {
		b := make([]byte, piece)
		for i := range want / piece {
			testkit.Pace(time.Until(start.Add(time.Duration(i) * step)))
			if _, err := o.far.Write(b); err != nil {
				o.t.Error(err)
				return
			}
		}
	})
	o.app.SetReadDeadline(start.Add(d + testkit.Patience))
	if n, err := io.CopyN(io.Discard, o.app, want); err != nil {
		o.t.Errorf("after %d of %d bytes: %v", n, want, err)
	}
	return time.Since(start)
}

// measure returns how long data for d took, the 99th percentile of the round trips, and how many datagrams were lost.
func (o *beside) measure(d time.Duration) (took, p99 time.Duration, lost int) {
	o.t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() { took = o.paced(d) })
	trips, lost := pingers(o.t, o.apps, o.echo, 2*time.Second, d)
	wg.Wait()
	if len(trips) == 0 {
		o.t.Fatal("no datagram came back")
	}
	return took, trips[len(trips)*99/100], lost
}

// TestDNSFlood: while 10,000 distinct names are asked each second, other flows lose nothing, hardly wait, and keep their rate;
// and memory is bounded.
func TestDNSFlood(t *testing.T) {
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--dns", noResolver, "--dns-pool", "198.19.0.0/16")
	others := newBeside(t, a)
	before := a.rss()
	// A machine that stalls lets everybody wait: so it has more than one try.
	for n := 1; ; n++ {
		slow, bad := floodDNS(a, others)
		if slow == "" && bad == "" {
			break
		}
		t.Logf("try %d: %s%s", n, slow, bad)
		if n < 5 {
			continue
		}
		if bad == "" {
			t.Skip("this machine asks too few questions for the test: ", slow)
		}
		t.Fatal(bad)
	}
	if grown := a.rss() - before; grown > 48<<20 && !raceEnabled { // the race detector has memory of its own
		t.Errorf("%d MiB more", grown>>20)
	}
}

// floodDNS measures other flows alone and beside a flood of questions. It returns why the machine is too slow for that, or what
// was bad.
func floodDNS(a *app, others *beside) (slow, bad string) {
	a.t.Helper()
	const rate, span = 10_000, 3 * time.Second
	alone, p99Alone, _ := others.measure(span)
	before, cpu, start := a.rss(), a.cpu(), time.Now()
	u, stop := a.udp(false), make(chan struct{})
	defer u.Close()
	asked, answered, wait := askMany(u, rate, stop)
	testkit.Eventually(a.t, "the first answers", func() bool { return answered.Load() > 0 })
	took, p99, lost := others.measure(span)
	cpu = a.cpu() - cpu
	all := time.Since(start)
	close(stop)
	wait()
	a.t.Logf("alone: %v for %v of data, p99 %v; beside %d questions, of which %d were answered: %v, p99 %v, %d lost; "+
		"%d KiB more, %v of CPU time", alone, span, p99Alone, asked.Load(), answered.Load(), took, p99, lost,
		(a.rss()-before)>>10, cpu)
	few := asked.Load() < rate*int64(span/time.Second)*8/10
	switch {
	case few && cpu > all*8/10 && !raceEnabled: // viasocks is slow, not the machine
		return "", fmt.Sprintf("only %d questions, and %v of CPU time in %v", asked.Load(), cpu, all)
	case answered.Load() < asked.Load()*95/100:
		return "", fmt.Sprintf("%d of %d questions were answered", answered.Load(), asked.Load())
	case few:
		return fmt.Sprintf("%d in %v", asked.Load(), all), ""
	case lost > 0:
		return "", fmt.Sprintf("%d datagrams of others were lost", lost)
	case took > alone+alone/2:
		return "", fmt.Sprintf("a flow took %v, alone %v", took, alone)
	case p99 > p99Alone+100*time.Millisecond:
		return "", fmt.Sprintf("the 99th percentile of round trips is %v, alone %v", p99, p99Alone)
	}
	return "", ""
}
