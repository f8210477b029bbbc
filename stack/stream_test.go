package stack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net/netip"
	"testing"

	gstack "gvisor.dev/gvisor/pkg/tcpip/stack"
)

var gstackPrimary = gstack.AddressProperties{}

func TestStreamBothWays(t *testing.T) {
	for name, off := range offloads {
		for _, dst := range []netip.AddrPort{srv4, srv6} {
			t.Run(name+"/"+dst.Addr().String(), func(t *testing.T) {
				p := newPair(t, off, Config{})
				app, up := p.connect(dst)
				data := make([]byte, 3<<20)
				rand.NewChaCha8([32]byte{1}).Read(data)
				want := sha256.Sum256(data)
				errs := make(chan error, 2)
				copyTo := func(w io.Writer) { _, err := io.Copy(w, struct{ io.Reader }{bytes.NewReader(data)}); errs <- err }
				go copyTo(app)
				go copyTo(up)
				for _, r := range []io.Reader{app, up} {
					go func() {
						h := sha256.New()
						_, err := io.CopyN(h, r, int64(len(data)))
						if err == nil && [32]byte(h.Sum(nil)) != want {
							err = errors.New("not what was sent")
						}
						errs <- err
					}()
				}
				for range 4 {
					if err := <-errs; err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
}
