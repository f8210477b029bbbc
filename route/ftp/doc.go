// Package ftp makes active FTP work through a proxy. It reads what a program says on a control connection, finds the
// commands PORT (RFC 959) and EPRT (RFC 2428), and replaces the endpoint of the program, which no server can reach, by
// one that a server can. Who provides that endpoint is handed in.
//
// Nothing else is changed. As soon as the program speaks TLS, which it does after the server has agreed to AUTH (RFC
// 4217), everything passes unread. The server's answers are never read.
package ftp
