// Package netns creates network namespaces, enters them, and passes a TUN device and a sock_diag socket between them.
//
// OpenTUN, Configure and OpenDiag act in the network namespace of the calling thread. A caller that has switched
// namespaces must lock its goroutine to the thread first. Their results can be used from anywhere: a TUN's file and a
// sock_diag socket belong to the namespace in which they were opened, whichever process holds them.
//
// Spawn runs one program in its own namespaces. A process with several threads cannot enter a user namespace, and a
// Go program always has several. The executable is therefore started once more inside the namespaces (MainIfChild).
// This helper sets up what the program will see, passes the files to the parent, and finally replaces itself by the
// program. handover.go describes the protocol between the two.
package netns
