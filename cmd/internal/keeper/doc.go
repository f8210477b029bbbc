// Package keeper steers a network namespace from a process inside it.
//
// `viasocks attach` carries what the programs in a namespace send and must itself stay outside, where the proxy is
// reached. A process of the same executable, the keeper, therefore enters the namespace. It makes the TUN there, passes
// its queues and a sock_diag socket out, adds the rules and the filter as `up` does for the host, restores what others
// change, and undoes everything when it is told to.
//
// The keeper ends when its process of `attach` dies, and leaves the namespace closed: the filter, the rules and the TUN
// without a reader stay, and refuse what would leave. Its journal lets the next keeper, or `viasocks down`, take over.
package keeper
