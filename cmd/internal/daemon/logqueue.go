package daemon

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

// Lines that wait for whoever reads the log, and how long the end waits for him.
const (
	logLines = 1024
	logFlush = time.Second
)

// logQueue is a Writer that never blocks, to one that may: a terminal that was stopped, a pipe that nobody reads. What
// there is no room for is lost and counted.
type logQueue struct {
	lines      chan []byte
	lost       atomic.Uint64
	stop, done chan struct{}
}

// newLogQueue needs to be closed. out is used until then, and after that where it was stuck.
func newLogQueue(out io.Writer) *logQueue {
	q := &logQueue{lines: make(chan []byte, logLines), stop: make(chan struct{}), done: make(chan struct{})}
	go q.run(out)
	return q
}

// Write takes one line.
func (q *logQueue) Write(p []byte) (int, error) {
	select {
	case q.lines <- bytes.Clone(p):
	default:
		q.lost.Add(1)
	}
	return len(p), nil
}

func (q *logQueue) run(out io.Writer) {
	defer close(q.done)
	write := func(line []byte) {
		_, _ = out.Write(line) // there is nobody to tell
		if n := q.lost.Swap(0); n > 0 {
			fmt.Fprintf(out, "time=%s level=WARN msg=\"lines of the log are lost: they were not read\" count=%d\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z07:00"), n)
		}
	}
	for {
		select {
		case line := <-q.lines:
			write(line)
		case <-q.stop:
			for len(q.lines) > 0 {
				write(<-q.lines)
			}
			return
		}
	}
}

// close waits a little until everything is written. What is written to the queue afterwards is lost.
func (q *logQueue) close() {
	close(q.stop)
	t := time.NewTimer(logFlush)
	defer t.Stop()
	select {
	case <-q.done:
	case <-t.C:
	}
}
