package loop

import (
	"slices"
	"time"
)

// Now returns the time since the loop was made, which is the loop's monotonic clock. It may be called from any
// goroutine.
func (l *Loop) Now() time.Duration { return time.Since(l.base) }

// SetTimer makes n get the bit Tick at the time when, on the clock of Now. A node has one timer; setting it again
// moves it.
func (l *Loop) SetTimer(n *Node, when time.Duration) {
	l.timers.set(n, when)
	l.arm(when)
}

// StopTimer cancels the timer. A Tick that was already set stays.
func (l *Loop) StopTimer(n *Node) { l.timers.remove(n) }

// arm sets the alarm to the time when, unless it is set to an earlier time. An alarm that rings too early does no
// harm, because fire looks at the timers and sets it again. It is therefore not moved when a node stops its timer.
func (l *Loop) arm(when time.Duration) {
	if l.armed != 0 && l.armed <= when {
		return
	}
	l.armed = max(when, 1)
	if d := max(when-l.Now(), 0); l.alarm == nil {
		l.alarm = time.AfterFunc(d, l.ring)
	} else {
		l.alarm.Reset(d)
	}
}

// ring runs on a goroutine of the runtime's timers.
func (l *Loop) ring() {
	l.rang.Store(true)
	l.unpark()
}

// fire gives a turn to the nodes whose timer is due. No timer is due before the alarm has rung.
func (l *Loop) fire() {
	if !l.rang.Load() || !l.rang.Swap(false) {
		return
	}
	l.armed = 0
	for now := l.Now(); len(l.timers) > 0; {
		n := l.timers[0]
		if n.when > now {
			l.arm(n.when)
			return
		}
		l.timers.remove(n)
		n.Got |= Tick
		l.Enqueue(n)
	}
}

// keepTimers is the capacity for timers that is kept when an eighth of it or less is used.
const keepTimers = 1000

// timers is a heap of nodes, ordered by the time of their timers.
type timers []*Node

// set puts n into the heap or moves it.
func (t *timers) set(n *Node, when time.Duration) {
	n.when = when
	if n.heapAt < 0 {
		n.heapAt = int32(len(*t))
		*t = append(*t, n)
	}
	t.up(int(n.heapAt))
	t.down(int(n.heapAt))
}

func (t *timers) remove(n *Node) {
	i := int(n.heapAt)
	if i < 0 {
		return
	}
	last := len(*t) - 1
	t.swap(i, last)
	(*t)[last] = nil
	*t = (*t)[:last]
	n.heapAt = -1
	if i < last {
		m := (*t)[i]
		t.up(int(m.heapAt))
		t.down(int(m.heapAt))
	}
	if cap(*t) > keepTimers && last <= cap(*t)/8 {
		*t = slices.Clone(*t)
	}
}

func (t timers) swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].heapAt, t[j].heapAt = int32(i), int32(j)
}

func (t timers) up(i int) {
	for i > 0 && t[i].when < t[(i-1)/2].when {
		t.swap(i, (i-1)/2)
		i = (i - 1) / 2
	}
}

func (t timers) down(i int) {
	for {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < len(t); c++ {
			if t[c].when < t[least].when {
				least = c
			}
		}
		if least == i {
			return
		}
		t.swap(i, least)
		i = least
	}
}
