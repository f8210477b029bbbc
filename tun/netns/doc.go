// Package netns makes network namespaces and enters them, and hands a TUN device and a sock_diag socket over between
// them.
//
// OpenTUN, Configure and OpenDiag act in the network namespace of the calling thread: who is elsewhere locks the thread
// first. Spawn runs one program in namespaces of its own, see there.
package netns
