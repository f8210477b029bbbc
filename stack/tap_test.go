package stack

import (
	"bytes"
	"sync"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
	"github.com/viasocks/viasocks/tun"
)

// TestTap: a Tap sees each frame in both directions, whole, and none after it was taken away.
func TestTap(t *testing.T) {
	e := newEcho()
	defer e.stop()
	p := newPair(t, offAll, Config{Shards: 1, Handler: e})
	var mu sync.Mutex
	var frames, bytesOf [2]uint64
	var all bytes.Buffer
	before := p.st.Stats()
	p.st.SetTap(func(_ *tun.Header, parts [][]byte, toApp bool) {
		mu.Lock()
		defer mu.Unlock()
		i := 0
		if toApp {
			i = 1
		}
		frames[i]++
		for _, b := range parts {
			bytesOf[i] += uint64(len(b))
			all.Write(b)
		}
	})
	if err := exchange(p.mustDial(srv4)); err != nil {
		t.Fatal(err)
	}
	testkit.Eventually(t, "the end of the stream", func() bool { return p.st.Stats().Streams == 0 })
	testkit.Eventually(t, "what is counted to be what was seen", func() bool {
		mu.Lock()
		defer mu.Unlock()
		s := p.st.Stats()
		return frames == [2]uint64{s.FramesIn - before.FramesIn, s.FramesOut - before.FramesOut} &&
			bytesOf == [2]uint64{s.BytesIn - before.BytesIn, s.BytesOut - before.BytesOut}
	})
	p.st.SetTap(nil)
	mu.Lock()
	if n := bytes.Count(all.Bytes(), []byte("hello")); n != 2 {
		t.Errorf("what was said was seen %d times", n)
	}
	seen := frames
	mu.Unlock()
	if err := exchange(p.mustDial(srv4)); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if frames != seen {
		t.Errorf("%v frames were seen after the end", frames)
	}
}
