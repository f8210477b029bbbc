package netns

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
)

// TXDropped returns how many packets the kernel could not put into the queue of a device, because it was full: for a
// TUN, packets of programs that viasocks did not read in time. The device is looked for in the network namespace of
// process pid; 0: of the calling thread.
func TXDropped(pid int, device string) (uint64, error) {
	dir := "/proc/thread-self"
	if pid != 0 {
		dir = "/proc/" + strconv.Itoa(pid)
	}
	all, err := os.ReadFile(dir + "/net/dev")
	if err != nil {
		return 0, err
	}
	return txDropped(all, device)
}

// txDropped finds the number in the text of /proc/net/dev: the twelfth after the name.
func txDropped(text []byte, device string) (uint64, error) {
	const column = 11
	for line := range bytes.Lines(text) {
		name, numbers, ok := bytes.Cut(line, []byte(":"))
		if !ok || string(bytes.TrimSpace(name)) != device {
			continue
		}
		if f := bytes.Fields(numbers); len(f) > column {
			return strconv.ParseUint(string(f[column]), 10, 64)
		}
	}
	return 0, fmt.Errorf("cannot read the counters of the device %s", device)
}

// TXDropped returns how many packets of the program the TUN of c has lost because its queue was full.
func (c *Child) TXDropped() (uint64, error) { return TXDropped(c.pid, c.TUNName) }
