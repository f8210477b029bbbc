package process

import "golang.org/x/sys/unix"

// MoreFiles raises the limit of open files as far as permitted: a flow holds one, a UDP mapping two. (The runtime
// raises it only to the hard limit.)
func MoreFiles() {
	const enough = 1 << 20
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil && l.Max < enough {
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: enough, Max: enough})
	}
}
