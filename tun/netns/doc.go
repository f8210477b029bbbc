// Package netns makes network namespaces and enters them, and hands a TUN device and a sock_diag socket over between
// them.
//
// OpenTUN, Configure and OpenDiag act in the network namespace of the calling thread: who is elsewhere locks the thread
// first. What they return works from anywhere: a TUN's file and a sock_diag socket belong to the namespace they were
// opened in, whoever holds them.
//
// Spawn runs one program in namespaces of its own. A process can't enter a user namespace with threads running, and a
// Go program always has some, so the executable is started once more inside them (MainIfChild); this helper makes what
// the program is to see, hands the files out, and in the end executes the program in its own place. The protocol
// between the two is drawn in handover.go.
package netns
