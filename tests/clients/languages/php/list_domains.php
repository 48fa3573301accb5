<?php
// Lists the domains of a fleet: `php list_domains.php build/stubs/php`. Unary calls need curl alone: HTTP/2, a length
// before the message, the status behind it.
use Virtfleet\Compute\V1\{DomainState, ListDomainsRequest, ListDomainsResponse};

set_include_path("$argv[1]:/usr/share/php");
spl_autoload_register(fn ($class) => include strtr($class, '\\', '/') . '.php');

function call(string $method, $request, $response) {
    $message = $request->serializeToString();
    $status = ['grpc-status' => '14', 'grpc-message' => ''];
    $curl = curl_init('https://' . getenv('VIRTFLEET_ADDRESS') . $method);
    curl_setopt_array($curl, [
        CURLOPT_HTTP_VERSION => CURL_HTTP_VERSION_2TLS, CURLOPT_TIMEOUT => 10, CURLOPT_RETURNTRANSFER => true,
        CURLOPT_CAINFO => getenv('VIRTFLEET_CA_FILE'),
        CURLOPT_SSLCERT => getenv('VIRTFLEET_CERT_FILE'), CURLOPT_SSLKEY => getenv('VIRTFLEET_KEY_FILE'),
        CURLOPT_HTTPHEADER => ['content-type: application/grpc', 'te: trailers'],
        CURLOPT_POSTFIELDS => "\0" . pack('N', strlen($message)) . $message,
        CURLOPT_HEADERFUNCTION => function ($curl, $line) use (&$status) {
            [$name, $value] = explode(':', $line, 2) + [1 => ''];
            $status[$name] = rawurldecode(trim($value));
            return strlen($line);
        },
    ]);
    $body = curl_exec($curl);
    if ($body === false || $status['grpc-status'] !== '0') {
        fwrite(STDERR, "status {$status['grpc-status']}: {$status['grpc-message']} " . curl_error($curl) . "\n");
        exit(1);
    }
    $response->mergeFromString(substr($body, 5));
    return $response;
}

$request = (new ListDomainsRequest())->setParent('nodes/-')->setPageSize(2);
do {
    $page = call('/virtfleet.compute.v1.DomainService/ListDomains', $request, new ListDomainsResponse());
    foreach ($page->getDomains() as $domain) {
        echo $domain->getName(), ' ', DomainState::name($domain->getStatus()->getState()), "\n";
    }
    $request->setPageToken($page->getNextPageToken());
} while ($page->getNextPageToken() !== '');
