package stack

import (
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/viasocks/viasocks/stack/flow"
	"github.com/viasocks/viasocks/tun"
)

// chunk is a payload of n bytes that costs nothing.
type chunk struct{ n int }

func (c *chunk) Len() int                   { return c.n }
func (c *chunk) Read(b []byte) (int, error) { n := min(len(b), c.n); c.n -= n; return n, nil }

// BenchmarkBulk moves 64 KiB for each op between the relay's side and an app with gVisor's stack: both stacks and the
// pipe between them are in the figure.
func BenchmarkBulk(b *testing.B) {
	for _, name := range []string{"full", "vnet", "off"} {
		b.Run("down/"+name, func(b *testing.B) {
			p := newPair(b, offloads[name], Config{})
			app, up := p.connect(srv4)
			const size = 65160
			b.SetBytes(size)
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				c := new(chunk)
				for range b.N {
					c.n = size
					for c.n > 0 {
						if _, err := up.st.WriteFrom(c); err == flow.ErrAgain {
							up.await(flow.Writable)
						} else if err != nil {
							return
						}
					}
				}
			}()
			buf := make([]byte, 256<<10)
			for n := 0; n < b.N*size; {
				m, err := app.Read(buf)
				if err != nil {
					b.Fatal(err)
				}
				n += m
			}
		})
		b.Run("up/"+name, func(b *testing.B) {
			p := newPair(b, offloads[name], Config{})
			app, up := p.connect(srv4)
			const size = 65160
			b.SetBytes(size)
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				buf := make([]byte, size)
				for range b.N {
					if _, err := app.Write(buf); err != nil {
						return
					}
				}
			}()
			for n := 0; n < b.N*size; {
				m, err := up.st.ReadTo(io.Discard)
				n += m
				if err == flow.ErrAgain {
					up.await(flow.Readable)
				} else if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkCrowd opens and resets one connection for each op, each to another address, beside many that are open. The app is a
// maker of segments, so that the figure is almost all the stack's. cpu-ns/op counts what the process used, not what it
// waited for.
func BenchmarkCrowd(b *testing.B) {
	for _, v6 := range []bool{false, true} {
		for _, held := range []int{0, 9000} {
			b.Run(fmt.Sprintf("v6=%v/held=%d", v6, held), func(b *testing.B) {
				r := newRawOver(b, offAll, Config{})
				buf, k := make([]byte, tun.MaxFrame), 0
				open := func() (src, dst netip.AddrPort, seq uint32, up *testConn) {
					k++
					app, peer, hdr := appIP4, netip.AddrFrom4([4]byte{10, 9, byte(k >> 8), byte(k)}), ip4HeaderLen
					if v6 {
						app, hdr = appIP6, ip6HeaderLen
						peer = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(k >> 8), 15: byte(k)})
					}
					src, dst = netip.AddrPortFrom(app, uint16(1024+k%60000)), netip.AddrPortFrom(peer, 80)
					r.send(tun.Header{Flags: tun.DataValid}, segment(src, dst, 1000, 0, header.TCPFlagSyn, nil, nil))
					up = newTestConn()
					r.request().Accept(up)
					var h tun.Header
					if _, err := r.dev.Read(&h, buf, true); err != nil { // the SYN-ACK
						b.Fatal(err)
					}
					ack := header.TCP(buf[hdr:]).SequenceNumber() + 1
					r.send(tun.Header{Flags: tun.DataValid}, segment(src, dst, 1001, ack, header.TCPFlagAck, nil, nil))
					if err := up.opened(); err != nil {
						b.Fatal(err)
					}
					return src, dst, ack, up
				}
				for range held {
					_, _, _, up := open()
					b.Cleanup(func() { up.st.Abort(); up.st.Close() })
				}
				b.ReportAllocs()
				start := cpuTime(b)
				for b.Loop() {
					src, dst, ack, up := open()
					r.send(
						tun.Header{Flags: tun.DataValid},
						segment(src, dst, 1001, ack, header.TCPFlagRst|header.TCPFlagAck, nil, nil),
					)
					if err := up.await(flow.Hup); err != nil {
						b.Fatal(err)
					}
					up.st.Close()
				}
				b.ReportMetric(float64(cpuTime(b)-start)/float64(b.N), "cpu-ns/op")
			})
		}
	}
}

// cpuTime is what this process has used.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
