package harness

import (
	"slices"
	"strings"
	"sync"
)

// Queue starts tests that run apart, no more than a number of them at once. Those that take longest go first: otherwise a few of
// them would run alone at the end.
type Queue struct {
	longest []string
	mu      sync.Mutex
	free    int
	waiting [][]chan struct{} // by rank
}

// NewQueue names the tests that take longest, by their own names or by those of their parents. All others come after them, in the
// order in which they ask.
func NewQueue(atOnce int, longest ...string) *Queue {
	return &Queue{longest: longest, free: atOnce, waiting: make([][]chan struct{}, len(longest)+1)}
}

// rank is the place of a test among those that take longest.
func (q *Queue) rank(name string) int {
	i := slices.IndexFunc(q.longest, func(long string) bool { return name == long || strings.HasPrefix(name, long+"/") })
	if i < 0 {
		return len(q.longest)
	}
	return i
}

// take waits for the turn of a test, and returns what ends it. Without a queue every turn comes at once.
func (q *Queue) take(name string) (done func()) {
	if q == nil {
		return func() {}
	}
	q.mu.Lock()
	if q.free > 0 {
		q.free--
		q.mu.Unlock()
		return q.next
	}
	turn, rank := make(chan struct{}), q.rank(name)
	q.waiting[rank] = append(q.waiting[rank], turn)
	q.mu.Unlock()
	<-turn
	return q.next
}

// next gives a turn that is over to the next test.
func (q *Queue) next() {
	q.mu.Lock()
	defer q.mu.Unlock()
	for rank, all := range q.waiting {
		if len(all) > 0 {
			q.waiting[rank] = all[1:]
			close(all[0])
			return
		}
	}
	q.free++
}
