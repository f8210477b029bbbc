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

// askMany asks for rate distinct names a second until stop is closed, and counts what was asked and answered.
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
		const step = 10 * time.Millisecond
		tick := time.NewTicker(step)
		defer tick.Stop()
		for start := time.Now(); ; {
			select {
			case <-stop:
				testkit.Settle(100*time.Millisecond, "the last answers have come")
				u.SetReadDeadline(time.Now())
				return
			case <-tick.C:
			}
			for due := int64(time.Since(start).Seconds() * float64(rate)); asked.Load() < due; {
				n := asked.Add(1)
				u.WriteToUDPAddrPort(ask(uint16(n), fmt.Sprintf("n%d.flood.example", n)), gateway53)
			}
		}
	})
	return asked, answered, wg.Wait
}

// TestDNSFlood: while 10,000 distinct names are asked each second, other flows lose nothing, hardly wait, and keep their rate;
// and memory is bounded.
func TestDNSFlood(t *testing.T) {
	const rate = 10_000
	proxy := listenSOCKS(t)
	a := startApp(t, "--proxy", proxy.URL(), "--dns", noResolver, "--dns-pool", "198.19.0.0/16")
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
	apps := []*net.UDPConn{a.udp(false), a.udp(false), a.udp(false)}
	app, far := pair(t, a, world4)
	// A flow of 16 MB/s, which leaves the machine room for the questions.
	paced := func(d time.Duration) (took time.Duration) {
		const piece, step = 160 << 10, 10 * time.Millisecond
		var wg sync.WaitGroup
		start := time.Now()
		want := int64(d/step) * piece
		wg.Go(func() {
			b := make([]byte, piece)
			for i := range want / piece {
				testkit.Pace(time.Until(start.Add(time.Duration(i) * step)))
				if _, err := far.Write(b); err != nil {
					t.Error(err)
					return
				}
			}
		})
		b := make([]byte, 256<<10)
		app.SetReadDeadline(start.Add(d + testkit.Patience))
		for got := int64(0); got < want; {
			n, err := app.Read(b)
			if got += int64(n); err != nil {
				t.Errorf("after %d of %d bytes: %v", got, want, err)
				break
			}
		}
		took = time.Since(start)
		wg.Wait()
		return took
	}
	measure := func(d time.Duration) (took time.Duration, p99 time.Duration, lost int) {
		var wg sync.WaitGroup
		wg.Go(func() { took = paced(d) })
		var trips []time.Duration
		trips, lost = pingers(t, apps, dst, 2*time.Second, d)
		wg.Wait()
		if len(trips) == 0 {
			t.Fatal("no datagram came back")
		}
		return took, trips[len(trips)*99/100], lost
	}
	pingers(t, apps, dst, testkit.Patience, 200*time.Millisecond) // the associations are there
	const span = 3 * time.Second
	alone, p99Alone, _ := measure(span)
	before := a.rss()
	stop := make(chan struct{})
	asked, answered, wait := askMany(a.udp(false), rate, stop)
	testkit.Eventually(t, "the first answers", func() bool { return answered.Load() > 0 })
	took, p99, lost := measure(span)
	close(stop)
	wait()
	t.Logf("alone: %v for %v of data, p99 %v; beside %d questions, of which %d were answered: %v, p99 %v, %d lost; %d KiB more",
		alone, span, p99Alone, asked.Load(), answered.Load(), took, p99, lost, (a.rss()-before)>>10)
	if asked.Load() < rate*int64(span/time.Second)*8/10 {
		t.Skipf("this machine asks %d questions in %v, too few for the test", asked.Load(), span)
	}
	if answered.Load() < asked.Load()*95/100 {
		t.Errorf("%d of %d questions were answered", answered.Load(), asked.Load())
	}
	if lost > 0 {
		t.Errorf("%d datagrams of others were lost", lost)
	}
	if took > alone+alone/2 {
		t.Errorf("a flow took %v, alone %v", took, alone)
	}
	if p99 > p99Alone+100*time.Millisecond {
		t.Errorf("the 99th percentile of round trips is %v, alone %v", p99, p99Alone)
	}
	if grown := a.rss() - before; grown > 48<<20 && !raceEnabled { // the race detector has memory of its own
		t.Errorf("%d MiB more", grown>>20)
	}
}
