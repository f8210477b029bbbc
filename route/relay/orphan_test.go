package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/viasocks/viasocks/stack/testkit"
)

// When the app's FIN was passed on, the upstream's socket is left to the kernel: the far end gets all that was sent, then FIN.
func TestOrphanOfHalfClosed(t *testing.T) {
	f := startFlow(t, newLoop(t))
	f.app.send([]byte("all of it"))
	f.app.sendFIN()
	f.running(t)
	f.Orphaned()
	if r := f.result(t); !errors.Is(r.Err, ErrOrphan) || r.Up != 9 {
		t.Errorf("%+v", r)
	}
	if got, err := io.ReadAll(f.up); string(got) != "all of it" || err != nil {
		t.Errorf("the far end got %q, %v", got, err)
	}
	if _, aborted, _ := f.app.state(); !aborted {
		t.Error("the app's stream was left open")
	}
}

// What the app sent before it closed its socket goes on for as long as the far end takes some of it, however slowly.
func TestOrphanWithDataLeft(t *testing.T) {
	was := lingerLimit
	t.Cleanup(func() { lingerLimit = was }) // when the loops have ended
	lingerLimit = 4 * time.Second           // a machine that stalls must not look like a far end that does not read
	for _, reads := range []bool{true, false} {
		f := startFlow(t, newLoop(t))
		data := pattern(16 << 20) // more than the kernel's buffers take
		f.app.send(data)
		f.app.sendFIN()
		over, stop := context.WithCancel(context.Background())
		var looks sync.WaitGroup
		defer looks.Wait()
		defer stop()
		looks.Go(func() {
			for over.Err() == nil {
				f.Orphaned()
				select {
				case <-over.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
		began := time.Now()
		var got bytes.Buffer
		if reads {
			b := make([]byte, 1<<20)
			for {
				n, err := f.up.Read(b)
				got.Write(b[:n])
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatalf("the far end reads slowly and is cut off after %d bytes: %v", got.Len(), err)
				}
				testkit.Pace(20 * time.Millisecond)
			}
			if !bytes.Equal(got.Bytes(), data) {
				t.Errorf("the far end got %d bytes", got.Len())
			}
		}
		r := f.result(t)
		stop()
		if !errors.Is(r.Err, ErrOrphan) {
			t.Errorf("reads %v: %+v", reads, r)
		}
		if !reads {
			if after := time.Since(began); after < lingerLimit {
				t.Errorf("ended after %v", after)
			}
			if _, err := io.Copy(&got, f.up); err == nil {
				t.Error("the far end that did not read saw no reset")
			}
		}
	}
}
