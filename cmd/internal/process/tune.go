package process

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// Tune trades memory for time: most of our memory is buffers that live as long as a connection, and a
// collection scans all of them. Measured: 10 to 20 % of the CPU time. The limit makes the collector work more again
// when this would need too much memory. The user's own GOGC and GOMEMLIMIT take precedence.
func Tune() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
	if total := memory(); total > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(total / 4)
	}
}

// memory returns the available memory in bytes: that of the machine, or of the control group if that is less; 0:
// unknown.
func memory() int64 {
	var total int64
	if b, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kb int64
		if _, err := fmt.Sscanf(string(b), "MemTotal: %d kB", &kb); err == nil {
			total = kb << 10
		}
	}
	if b, err := os.ReadFile("/proc/self/cgroup"); err == nil {
		if _, path, ok := strings.Cut(strings.TrimSpace(string(b)), "0::"); ok {
			path, _, _ = strings.Cut(path, "\n")
			if b, err := os.ReadFile("/sys/fs/cgroup" + path + "/memory.max"); err == nil {
				if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && (total == 0 || n < total) {
					total = n
				}
			}
		}
	}
	return total
}
