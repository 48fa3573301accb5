package virtfleet

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"google.golang.org/grpc/credentials"
)

// fileCredentials is mutual TLS whose files are read again, when they have changed, for each new connection.
type fileCredentials struct {
	files Credentials

	mutex  sync.Mutex
	loaded *tls.Config
	stamps [3]stamp
}

// stamp is what changes when a file is replaced.
type stamp struct {
	modified int64
	size     int64
	inode    any
}

func newFileCredentials(files Credentials) (*fileCredentials, error) {
	if files.CAFile == "" || files.CertFile == "" || files.KeyFile == "" {
		return nil, errors.New("mutual TLS needs three files: of the authority, the certificate and its key " +
			"(VIRTFLEET_CA_FILE, VIRTFLEET_CERT_FILE and VIRTFLEET_KEY_FILE, or ca_file, cert_file and key_file of the context)")
	}
	found := &fileCredentials{files: files}
	_, err := found.config()
	return found, err
}

// config returns what the files say now. While they are being replaced and do not fit together, the last good ones stay.
func (c *fileCredentials) config() (*tls.Config, error) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	stamps, err := c.look()
	if err == nil && c.loaded != nil && stamps == c.stamps {
		return c.loaded, nil
	}
	if err == nil {
		var fresh *tls.Config
		if fresh, err = c.load(); err == nil {
			c.loaded, c.stamps = fresh, stamps
			return fresh, nil
		}
	}
	if c.loaded != nil {
		return c.loaded, nil
	}
	return nil, err
}

func (c *fileCredentials) look() (stamps [3]stamp, err error) {
	for index, path := range []string{c.files.CAFile, c.files.CertFile, c.files.KeyFile} {
		info, err := os.Stat(path)
		if err != nil {
			return stamps, err
		}
		stamps[index] = stamp{info.ModTime().UnixNano(), info.Size(), inodeOf(info)}
	}
	return stamps, nil
}

func (c *fileCredentials) load() (*tls.Config, error) {
	authority, err := readSmall(c.files.CAFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(authority) {
		return nil, fmt.Errorf("%s holds no certificate", c.files.CAFile)
	}
	chain, err := readSmall(c.files.CertFile)
	if err != nil {
		return nil, err
	}
	key, err := readSmall(c.files.KeyFile)
	if err != nil {
		return nil, err
	}
	own, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("%s and %s: %w", c.files.CertFile, c.files.KeyFile, err)
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		RootCAs:      roots,
		Certificates: []tls.Certificate{own},
	}, nil
}

// ClientHandshake is part of credentials.TransportCredentials.
func (c *fileCredentials) ClientHandshake(
	ctx context.Context, authority string, conn net.Conn,
) (net.Conn, credentials.AuthInfo, error) {
	config, err := c.config()
	if err != nil {
		return nil, nil, err
	}
	return credentials.NewTLS(config).ClientHandshake(ctx, authority, conn)
}

// ServerHandshake is part of credentials.TransportCredentials; a client has no use for it.
func (c *fileCredentials) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are credentials of a client")
}

// Info is part of credentials.TransportCredentials.
func (c *fileCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone is part of credentials.TransportCredentials. All clones share what is loaded.
func (c *fileCredentials) Clone() credentials.TransportCredentials {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return &fileCredentials{files: c.files, loaded: c.loaded, stamps: c.stamps}
}

// OverrideServerName is part of credentials.TransportCredentials; the name is the authority of the connection.
func (c *fileCredentials) OverrideServerName(string) error {
	return errors.New("use grpc.WithAuthority")
}
