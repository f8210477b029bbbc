package e2e

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// pingers sends n sockets' datagrams to an echo, one at a time each, 100 a second, for d. It returns the round trips and
// how many took longer than wait, or were lost.
func pingers(t *testing.T, apps []*net.UDPConn, dst netip.AddrPort, wait, d time.Duration) (trips []time.Duration, lost int) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	end := time.Now().Add(d)
	for _, app := range apps {
		wg.Go(func() {
			b, got := make([]byte, 200), make([]byte, 2000)
			var mine []time.Duration
			gone := 0
			for i := uint64(1); time.Now().Before(end); i++ {
				start := time.Now()
				binary.BigEndian.PutUint64(b, i)
				if _, err := app.WriteToUDPAddrPort(b, dst); err != nil {
					t.Error(err)
					return
				}
				app.SetReadDeadline(start.Add(wait))
				for {
					n, _, err := app.ReadFromUDPAddrPort(got)
					if err != nil {
						gone++
						break
					}
					if n >= 8 && binary.BigEndian.Uint64(got) == i {
						mine = append(mine, time.Since(start))
						break
					}
				}
				testkit.Pace(10*time.Millisecond - time.Since(start))
			}
			mu.Lock()
			defer mu.Unlock()
			trips = append(trips, mine...)
			lost += gone
		})
	}
	wg.Wait()
	slices.Sort(trips)
	return trips, lost
}

// TestUDPFair: one socket sends 12 MB/s without a pause; twenty others lose nothing and hardly wait. Then one sends all that it
// can, more than is read from the TUN: it loses its own datagrams, and the others have their answers.
func TestUDPFair(t *testing.T) {
	for _, offload := range []string{"full", "nouso", "off"} {
		t.Run("offload="+offload, func(t *testing.T) {
			proxy := listenSOCKS(t)
			a := startApp(t, "--proxy", proxy.URL(), "--offload", offload)
			far, dst := farUDP(t, world4)
			go func() {
				b := make([]byte, 2000)
				for {
					n, from, err := far.ReadFromUDPAddrPort(b)
					if err != nil {
						return
					}
					far.WriteToUDPAddrPort(b[:n], from)
				}
			}()
			_, sink := farUDP(t, world4) // nobody reads it
			var apps []*net.UDPConn
			for range 20 {
				apps = append(apps, a.udp(false))
			}
			pingers(t, apps, dst, testkit.Patience, 300*time.Millisecond) // the associations are there
			flooder := a.udp(false)
			steady := func() (trips []time.Duration, lost int) {
				var stop atomic.Bool
				var wg sync.WaitGroup
				wg.Go(func() {
					b := make([]byte, 1200)
					for !stop.Load() {
						for range 10 {
							flooder.WriteToUDPAddrPort(b, sink)
						}
						testkit.Pace(time.Millisecond)
					}
				})
				defer wg.Wait()
				defer stop.Store(true)
				return pingers(t, apps, dst, 5*time.Second, time.Second)
			}
			median := func(d []time.Duration) time.Duration {
				if len(d) == 0 {
					return time.Hour
				}
				return d[len(d)/2]
			}
			// A machine that stalls overflows any queue: so it has more than one try.
			try := func(what string, f func() ([]time.Duration, int)) {
				t.Helper()
				for n := 1; ; n++ {
					alone, lost0 := pingers(t, apps, dst, 5*time.Second, 500*time.Millisecond)
					beside, lost := f()
					t.Logf(
						"alone: %d trips, p50 %v, %d lost; %s: %d, p50 %v, %d lost",
						len(alone),
						median(alone),
						lost0,
						what,
						len(beside),
						median(beside),
						lost,
					)
					if lost == 0 && median(beside) < 10*median(alone)+5*time.Millisecond {
						return
					}
					if n == 5 {
						t.Errorf("%s they are starved", what)
						return
					}
				}
			}
			try("beside 12 MB/s", steady)
			for n := 1; ; n++ {
				end := flood(t, flooder, sink)
				trips, lost := pingers(t, apps, dst, time.Second, time.Second)
				t.Logf("beside a flood of %d datagrams: %d trips, p50 %v, %d lost", end(), len(trips), median(trips), lost)
				if lost <= len(trips)/20 {
					break
				}
				if n == 5 {
					t.Error("beside a flood they are starved")
					break
				}
			}
			try(
				"after a flood",
				func() ([]time.Duration, int) { return pingers(t, apps, dst, 5*time.Second, 500*time.Millisecond) },
			)
		})
	}
}
