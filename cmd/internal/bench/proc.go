package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// cpuSeconds returns the user and system time of a process by its own clock (clock_getcpuclockid(3)). It is 0 if the
// process does not exist.
func cpuSeconds(pid int) float64 {
	if pid <= 0 {
		return 0
	}
	var t unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|2), &t) != nil { // 2: the scheduler's clock
		return 0
	}
	return float64(t.Nano()) / 1e9
}

// cpu returns the CPU time of all processes that are watched.
func (l *loader) cpu() float64 {
	s := cpuSeconds(l.watch)
	for _, pid := range l.also {
		s += cpuSeconds(pid)
	}
	return s
}

// processes reads a list of process ids with commas between them. 0 is this process.
func processes(list string) (all []int, err error) {
	if list == "" {
		return nil, nil
	}
	for id := range strings.SplitSeq(list, ",") {
		pid, err := strconv.Atoi(id)
		if err != nil || pid < 0 {
			return nil, fmt.Errorf("%q is not a process", id)
		}
		if pid == 0 {
			pid = os.Getpid()
		}
		all = append(all, pid)
	}
	return all, nil
}

// memory returns VmRSS and VmHWM of a process in bytes.
func memory(pid int) (rss, peak int64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		kb, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "VmRSS:":
			rss = kb << 10
		case "VmHWM:":
			peak = kb << 10
		}
	}
	return rss, peak
}
