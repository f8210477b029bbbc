package dns

import (
	"sync"
	"time"
)

// flights are the questions in progress to a resolver, so that the same question is not sent again meanwhile: the
// first asker leads, and later ones wait for its answer. Its methods may be called from any goroutine.
type flights struct {
	most int // waiting askers of all flights together

	mu      sync.Mutex
	byKey   map[string]*flight
	waiting int
}

type flight struct {
	askers []waiter
	until  time.Time // the leader has an answer by then, or never
}

// waiter is an asker that waits for the leader's answer.
type waiter struct {
	head  []byte // the header and the question of its message
	q     question
	reply func([]byte)
}

// role is what an asker must do.
type role uint8

const (
	leads   role = iota // it must ask
	follows             // its reply is called with the answer to the leader
	tooMany             // it can neither lead nor wait
)

// join lets an asker wait for the answer to a key, or lead until the given time.
func (f *flights) join(key []byte, msg []byte, q *question, reply func([]byte), now, until time.Time) role {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.byKey == nil {
		f.byKey = make(map[string]*flight)
	}
	x := f.byKey[string(key)]
	switch {
	case x == nil || !now.Before(x.until): // the leader was dropped, and those who wait for it will ask again
		if x != nil {
			f.waiting -= len(x.askers)
		}
		f.byKey[string(key)] = &flight{until: until}
		return leads
	case f.waiting >= f.most:
		return tooMany
	}
	f.waiting++
	x.askers = append(x.askers, waiter{append([]byte(nil), msg[:q.end]...), *q, reply})
	return follows
}

// land ends the flight of a key and returns those who wait for its answer.
func (f *flights) land(key string) []waiter {
	f.mu.Lock()
	defer f.mu.Unlock()
	x := f.byKey[key]
	if x == nil {
		return nil
	}
	delete(f.byKey, key)
	f.waiting -= len(x.askers)
	return x.askers
}
