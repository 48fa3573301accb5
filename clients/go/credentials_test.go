package virtfleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	peerinfo "google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"

	commonv1 "virtfleet.dev/go/common/v1"
)

// authority issues certificates for a test.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "authority"},
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{parsed, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// issue returns a certificate and its key.
func (a *authority) issue(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	own := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}, a.certificate, own.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := x509.MarshalECPrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: encoded})
}

func write(t *testing.T, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// startTLSPeer starts a server that answers WhoAmI with the name in the certificate of the caller, and returns its address and what
// cuts its connections.
func startTLSPeer(t *testing.T, fleet *authority) (address string, cut func()) {
	t.Helper()
	certificate, key := fleet.issue(t, "gateway.example")
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(fleet.certificate)
	config := &tls.Config{Certificates: []tls.Certificate{pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots}
	answers := &peer{answer: func(_ int, _ proto.Message, stream grpc.ServerStream) error {
		caller, _ := peerinfo.FromContext(stream.Context())
		state := caller.AuthInfo.(credentials.TLSInfo).State
		return stream.SendMsg(&commonv1.WhoAmIResponse{Subject: state.PeerCertificates[0].Subject.CommonName})
	}}
	listen := func(where string) *grpc.Server {
		listener, err := net.Listen("tcp", where)
		if err != nil {
			t.Fatal(err)
		}
		server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.UnknownServiceHandler(answers.handle))
		go func() { _ = server.Serve(listener) }()
		t.Cleanup(server.Stop)
		address = listener.Addr().String()
		return server
	}
	server := listen("127.0.0.1:0")
	return address, func() {
		server.Stop()
		server = listen(address)
	}
}

func TestCredentialsAreReadAgainAtEachConnection(t *testing.T) {
	fleet := newAuthority(t)
	folder := t.TempDir()
	files := Credentials{filepath.Join(folder, "ca.crt"), filepath.Join(folder, "me.crt"), filepath.Join(folder, "me.key")}
	renew := func(name string) {
		certificate, key := fleet.issue(t, name)
		write(t, files.CertFile, certificate)
		write(t, files.KeyFile, key)
	}
	write(t, files.CAFile, fleet.pem)
	renew("first")
	address, cut := startTLSPeer(t, fleet)
	client, err := Dial(t.Context(), WithAddress(address), WithCredentials(files))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	whoami := func() string {
		t.Helper()
		if err := client.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
		answer, err := client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return answer.GetSubject()
	}
	if who := whoami(); who != "first" {
		t.Error(who)
	}
	renew("second")
	cut()
	if who := whoami(); who != "second" {
		t.Errorf("after the renewal: %s", who)
	}
	// In the middle of a replacement certificate and key do not fit together: the last good ones hold.
	certificate, key := fleet.issue(t, "third")
	write(t, files.CertFile, certificate)
	cut()
	if who := whoami(); who != "second" {
		t.Errorf("in the middle of a renewal: %s", who)
	}
	write(t, files.KeyFile, key)
	cut()
	if who := whoami(); who != "third" {
		t.Errorf("after the renewal: %s", who)
	}
}

func TestAServerOfAnotherAuthorityOrNameIsRefused(t *testing.T) {
	fleet, other := newAuthority(t), newAuthority(t)
	address, _ := startTLSPeer(t, fleet)
	folder := t.TempDir()
	files := Credentials{filepath.Join(folder, "ca.crt"), filepath.Join(folder, "me.crt"), filepath.Join(folder, "me.key")}
	certificate, key := fleet.issue(t, "me")
	write(t, files.CertFile, certificate)
	write(t, files.KeyFile, key)
	for name, one := range map[string]struct {
		ca      []byte
		query   string
		refused bool
	}{
		"another authority": {other.pem, "", true},
		"another name":      {fleet.pem, "?server_name=elsewhere.example", true},
		"its name":          {fleet.pem, "?server_name=gateway.example", false},
	} {
		write(t, files.CAFile, one.ca)
		client, err := Dial(t.Context(), WithAddress("tls://"+address+one.query), WithCredentials(files))
		if err != nil {
			t.Fatal(err)
		}
		_, err = client.Access.WhoAmI(t.Context(), &commonv1.WhoAmIRequest{})
		if refused := errors.Is(err, ErrUnavailable); refused != one.refused {
			t.Errorf("%s: %v", name, err)
		}
		_ = client.Close()
	}
}
