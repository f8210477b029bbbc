package process

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/viasocks/viasocks/stack/testkit"
)

// What nobody reads does not block, and is counted; what is read comes in order, the last lines before close returns.
func TestLogQueue(t *testing.T) {
	testkit.CheckLeaks(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	q := NewLogQueue(w)
	const n = 20_000
	for i := range n {
		fmt.Fprintf(q, "line %d %s\n", i, strings.Repeat("x", 100))
	}
	read, lost, last := 0, 0, -1
	in := bufio.NewReader(r)
	next := func() {
		t.Helper()
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatal(err)
		}
		var i int
		if _, err := fmt.Sscanf(line, "line %d", &i); err == nil {
			if i <= last {
				t.Fatalf("line %d after %d", i, last)
			}
			read, last = read+1, i
		} else if _, count, ok := strings.Cut(line, "count="); ok {
			fmt.Sscan(count, &i)
			lost += i
		} else {
			t.Fatalf("%q", line)
		}
	}
	for read+lost < n {
		next()
	}
	if lost == 0 || read < logLines {
		t.Errorf("%d read, %d lost", read, lost)
	}
	fmt.Fprintf(q, "line %d\n", n)
	q.Close()
	w.Close()
	if next(); last != n {
		t.Errorf("the last line is %d", last)
	}
}

// close does not wait for ever.
func TestLogQueueStuck(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	q := NewLogQueue(w)
	for range logLines {
		fmt.Fprintln(q, strings.Repeat("x", 1000))
	}
	q.Close()
	r.Close() // it is stuck no longer
	<-q.done
	w.Close()
}

// One who reads as fast as he can loses nothing of a burst, on one processor either.
func TestLogQueueBurst(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for try := 1; ; try++ { // a machine that stalls is not one who reads
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		read := make(chan int)
		go func() {
			n := 0
			for in := bufio.NewScanner(r); in.Scan(); {
				if strings.HasPrefix(in.Text(), "line ") {
					n++
				}
			}
			read <- n
		}()
		q := NewLogQueue(w)
		const n = 50_000
		for i := range n {
			fmt.Fprintf(q, "line %d %s\n", i, strings.Repeat("x", 100))
		}
		for len(q.lines) > 0 {
			runtime.Gosched()
		}
		q.Close()
		w.Close()
		got := <-read
		r.Close()
		if got == n {
			return
		}
		t.Logf("%d of %d lines came", got, n)
		if try == 5 {
			t.Fatal("no try lost nothing")
		}
	}
}
