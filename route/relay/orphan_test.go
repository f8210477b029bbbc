package relay

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"
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
	defer func(d time.Duration) { lingerLimit = d }(lingerLimit)
	lingerLimit = 500 * time.Millisecond
	for _, reads := range []bool{true, false} {
		f := startFlow(t, newLoop(t))
		data := pattern(16 << 20) // more than the kernel's buffers take
		f.app.send(data)
		f.app.sendFIN()
		ended := make(chan struct{})
		looks := make(chan struct{})
		go func() {
			defer close(looks)
			for {
				select {
				case <-ended:
					return
				case <-time.After(20 * time.Millisecond):
					f.Orphaned()
				}
			}
		}()
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
				time.Sleep(20 * time.Millisecond)
			}
			if !bytes.Equal(got.Bytes(), data) {
				t.Errorf("the far end got %d bytes", got.Len())
			}
		}
		r := f.result(t)
		close(ended)
		<-looks
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
