package netns

import "testing"

func TestTXDropped(t *testing.T) {
	const text = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     840      10    0    0    0     0          0         0      840      10    0    0    0     0       0          0
  tun0:1    2    3    4    5     6          7         8      9      10    11    12    13     14       15          16
`
	for device, want := range map[string]uint64{"lo": 0, "tun0": 12} {
		if n, err := txDropped([]byte(text), device); n != want || err != nil {
			t.Errorf("%s: %d, %v", device, n, err)
		}
	}
	for _, bad := range []string{"", "tun0:", "tun0: 1 2 3 4 5 6 7 8 9 10 11 x", text} {
		if _, err := txDropped([]byte(bad), "tun"); err == nil {
			t.Errorf("%q has the device", bad)
		}
	}
	if _, err := txDropped([]byte("tun0: 1 2 3 4 5 6 7 8 9 10 11 x"), "tun0"); err == nil {
		t.Error("a letter was a number")
	}
	if _, err := TXDropped(0, "lo"); err != nil {
		t.Error(err)
	}
}
