package harness

import (
	"fmt"
	"testing"
	"testing/synctest"
)

// TestQueue: no more tests than allowed run at once, and of those that wait the longest goes next; others go as they came.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(2, "TestLongest", "TestLong/sub")
		var order []string
		over := map[string]chan struct{}{}
		for _, name := range []string{
			"TestA", "TestB", "TestC", "TestLong/other", "TestLong/sub", "TestLongestOfAll", "TestLongest/sub",
		} {
			over[name] = make(chan struct{})
			go func() {
				done := q.take(name)
				defer done()
				order = append(order, name)
				<-over[name]
			}()
			synctest.Wait()
		}
		want := []string{"TestA", "TestB", "TestLongest/sub", "TestLong/sub", "TestC", "TestLong/other", "TestLongestOfAll"}
		for i, name := range want {
			if got := fmt.Sprint(order); got != fmt.Sprint(want[:min(i+2, len(want))]) {
				t.Errorf("when %d are over, these have started: %s", i, got)
			}
			close(over[name])
			synctest.Wait()
		}
		if q.free != 2 {
			t.Errorf("after all %d turns are free", q.free)
		}
	})
}
