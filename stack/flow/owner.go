package flow

// Owner is whose a socket is. What cannot be seen is zero.
type Owner struct {
	Known  bool   // UID is: the socket was found
	UID    uint32 // of who made the socket
	PID    int    // of a process that has it open
	Exe    string // the executable of that process
	Cgroup string // the control group (version 2) of who made the socket: its path below the root, without a slash at its ends
}

// Owners tells whose sockets are. It may take milliseconds, because it reads /proc, and so must not be asked from the frame
// reader or an event loop.
type Owners interface {
	// OwnersOf looks for the sockets that began the flows, all at a time, and writes what it finds to owners, which is as
	// long as flows. It is called by one goroutine at a time.
	OwnersOf(flows []Flow, owners []Owner)
}
