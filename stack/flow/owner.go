package flow

// Owner is the owner of a socket. Unknown fields are zero.
type Owner struct {
	Known bool   // the socket was found, so UID is valid
	UID   uint32 // user who made the socket
	PID   int    // a process that has it open
	Exe   string // the executable of that process
	// control group (version 2) in which the socket was made: its path below the root, without slashes at either end
	Cgroup string
}

// Owners finds the owners of sockets. This may take milliseconds, because it reads /proc; it must not be called from
// the frame reader or an event loop.
type Owners interface {
	// OwnersOf looks up the sockets that began the flows, all of them together, and writes the results to owners,
	// which has the length of flows. It is called by one goroutine at a time.
	OwnersOf(flows []Flow, owners []Owner)
}
