package main

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// Each attempt of a scan goes to another address, and its outcome is that of the network and port that it goes to.
func TestScannedAddresses(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		in, silent := crowd4, silent4
		if v6 {
			in, silent = crowd6, silent6
		}
		seen := map[netip.Addr]bool{}
		count := map[outcome]int{}
		for i := range scanCount {
			to, want := scanned(i, v6)
			if seen[to.Addr()] {
				t.Fatalf("attempt %d goes to %v once more", i, to)
			}
			seen[to.Addr()] = true
			count[want]++
			if silent.Contains(to.Addr()) != (want == isSilent) || in.Contains(to.Addr()) == (want == isSilent) ||
				(to.Port() == crowdPort) != (want == isOpen) {
				t.Errorf("attempt %d goes to %v, to end as %d", i, to, want)
			}
		}
		if count[isOpen] != scanCount/8 || count[isSilent] != scanCount/8 || count[isRefused] != scanCount*6/8 {
			t.Errorf("v6 %v: %v", v6, count)
		}
	}
}

// listen serves each connection until the test ends.
func listen(t *testing.T, serve func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// An attempt is told apart by how it ends, natively by the reply.
func TestAttempt(t *testing.T) {
	answers := map[uint16]byte{1: 0, 2: 5, 3: 4} // by the port that is asked for; others get none
	proxy := listen(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 10)
		if _, err := io.ReadFull(c, b[:3]); err != nil {
			return
		}
		c.Write([]byte{5, 0})
		if _, err := io.ReadFull(c, b); err != nil {
			return
		}
		if code, ok := answers[uint16(b[9])]; ok {
			c.Write(reply(code, netip.AddrPort{}))
		}
		io.Copy(io.Discard, c)
	})
	open := listen(t, func(c *net.TCPConn) { io.Copy(io.Discard, c); c.Close() })
	gone, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := gone.Addr().(*net.TCPAddr).AddrPort()
	gone.Close()
	plain, native := &loader{}, &loader{proxy: proxy}
	for _, c := range []struct {
		name string
		l    *loader
		to   netip.AddrPort
		want outcome
	}{
		{"plainly, open", plain, open, isOpen},
		{"plainly, refused", plain, refusing, isRefused},
		{"natively, open", native, netip.MustParseAddrPort("192.0.2.1:1"), isOpen},
		{"natively, refused", native, netip.MustParseAddrPort("192.0.2.1:2"), isRefused},
		{"natively, unreachable", native, netip.MustParseAddrPort("192.0.2.1:3"), isOther},
		{"natively, silent", native, netip.MustParseAddrPort("192.0.2.1:4"), isSilent},
		{"no server", &loader{proxy: refusing}, netip.MustParseAddrPort("192.0.2.1:1"), isRefused},
	} {
		patience := 20 * time.Second
		if c.want == isSilent {
			patience = 50 * time.Millisecond
		}
		if got, err := c.l.attempt(c.to, patience); got != c.want || (err != nil) != (c.want == isOther) {
			t.Errorf("%s: %d, %v, want %d", c.name, got, err, c.want)
		}
	}
}

// A churn in small: connections come at their rate while a download goes on, and both are counted.
func TestChurn(t *testing.T) {
	l := &loader{target: listen(t, serveWork), seconds: 400 * time.Millisecond, watch: os.Getpid()}
	r, err := l.churn()
	if err != nil {
		t.Fatal(err)
	}
	// The machine may be busy, and what comes due meanwhile is left out.
	if want := churnRate * l.seconds.Seconds(); r.Work < want/4 || r.Work > want || r.P50us <= 0 || r.P99us < r.P50us {
		t.Errorf("%+v", r)
	}
	if len(r.Beside) != 2 || r.Beside[0].Value <= 0 || r.Beside[1].Value <= 0 || !r.ownCPU {
		t.Errorf("%+v", r.Beside)
	}
}

// What connections cost is what the bytes do not explain.
func TestCPUOfSlices(t *testing.T) {
	var alone, both slice
	alone.add(slice{1, 0.5, 100})
	alone.add(slice{1, 0.5, 100})
	both.add(slice{2, 1.25, 50})
	if got := both.over(alone); got != 1 {
		t.Errorf("%v", got)
	}
	if got := (&slice{1, 0.1, 100}).over(alone); got != 0 {
		t.Errorf("less than its bytes cost: %v", got)
	}
	if got := both.over(slice{}); got != 0 {
		t.Errorf("without a download: %v", got)
	}
}

func TestCPUSeconds(t *testing.T) {
	before := cpuSeconds(os.Getpid())
	for end := time.Now().Add(30 * time.Millisecond); time.Now().Before(end); {
	}
	if spent := cpuSeconds(os.Getpid()) - before; before <= 0 || spent <= 0 || spent > 20 {
		t.Errorf("%v s before, %v s spent", before, spent)
	}
	if got := cpuSeconds(0); got != 0 {
		t.Errorf("no process: %v", got)
	}
}

// The CPU time of several processes is added.
func TestCPUOfProcesses(t *testing.T) {
	also, err := processes(fmt.Sprintf("0,%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	one, three := &loader{watch: os.Getpid()}, &loader{watch: os.Getpid(), also: also}
	if low, got, high := 3*one.cpu(), three.cpu(), 3*one.cpu(); got < low || got > high || low <= 0 {
		t.Errorf("%v s of three processes, where one has %v to %v", got, low/3, high/3)
	}
	for _, list := range []string{"x", "1,", "-1"} {
		if all, err := processes(list); err == nil {
			t.Errorf("%q gives %v", list, all)
		}
	}
}
