package process

import "testing"

func TestMemory(t *testing.T) {
	if n := memory(); n < 1<<20 {
		t.Errorf("this machine has %d bytes of memory", n)
	}
}
