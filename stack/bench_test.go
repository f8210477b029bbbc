package stack

import (
	"io"
	"testing"

	"github.com/viasocks/viasocks/stack/flow"
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
